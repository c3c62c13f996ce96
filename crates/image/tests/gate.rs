//! Which files are opened for a chain: those that the images name, in the folders where they may lie, and no others.

use image::gate::{Gate, MAX_DEPTH};
use image::vhd;
use image::vhdx::{self, Options};
use image::{ErrorKind, Layer, ParentLink, Result};
use std::path::Path;
use std::sync::{Arc, Mutex};
use store::host::HostFolder;
use store::sim::Sim;
use store::{Folder, Mode, Store};

const MIB: u64 = 1 << 20;

/// A folder that writes down what is asked of it.
#[derive(Debug)]
struct Watched {
    inner: Arc<dyn Folder>,
    asked: Mutex<Vec<String>>,
}

impl Watched {
    fn new(inner: Arc<dyn Folder>) -> Arc<Self> {
        Arc::new(Self { inner, asked: Mutex::default() })
    }

    /// What was asked since the last time.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

impl Folder for Watched {
    fn open(&self, name: &str, mode: Mode) -> store::Result<Arc<dyn Store>> {
        self.asked.lock().unwrap().push(name.to_owned());
        self.inner.open(name, mode)
    }

    fn list(&self) -> store::Result<Vec<String>> {
        self.asked.lock().unwrap().push("*".to_owned());
        self.inner.list()
    }

    fn create(&self, _: &str) -> store::Result<Arc<dyn Store>> {
        panic!("a gate only opens")
    }

    fn rename(&self, _: &str, _: &str) -> store::Result<()> {
        panic!("a gate only opens")
    }

    fn link(&self, _: &str, _: &dyn Folder, _: &str) -> store::Result<()> {
        panic!("a gate only opens")
    }

    fn links(&self, _: &str) -> store::Result<u64> {
        panic!("a gate only opens")
    }

    fn unlink(&self, _: &str) -> store::Result<()> {
        panic!("a gate only opens")
    }

    fn create_folder(&self, _: &str) -> store::Result<Arc<dyn Folder>> {
        panic!("a gate only opens")
    }

    fn folder(&self, _: &str) -> store::Result<Arc<dyn Folder>> {
        panic!("a gate only opens")
    }

    fn remove_folder(&self, _: &str) -> store::Result<()> {
        panic!("a gate only opens")
    }

    fn sync(&self) -> store::Result<()> {
        panic!("a gate only opens")
    }

    fn room(&self) -> store::Result<u64> {
        panic!("a gate only opens")
    }
}

/// An image over `parent`.
fn child(folder: &Arc<dyn Folder>, name: &str, parent: &dyn Layer, parent_name: &str) -> Arc<dyn Layer> {
    let options = Options::differencing(parent, parent_name).unwrap();
    vhdx::create(folder.create(name).unwrap(), &options).unwrap()
}

#[test]
fn the_deepest_chain_is_opened_file_by_file_and_a_deeper_one_is_refused() {
    let root = Sim::new().root();
    let name = |number: usize| format!("{number}.vhdx");
    let mut layer: Arc<dyn Layer> = vhdx::create(root.create(&name(0)).unwrap(), &Options::dynamic(4 * MIB)).unwrap();
    for number in 1..=MAX_DEPTH {
        layer = child(&root, &name(number), &*layer, &name(number - 1));
    }
    drop(layer);
    let watched = Watched::new(root);
    let folder: Arc<dyn Folder> = Arc::<Watched>::clone(&watched);
    let open = |number| Gate::default().open(&folder, &name(number), None, Mode::Read);
    assert_eq!(open(MAX_DEPTH - 1).unwrap().len(), MAX_DEPTH);
    let expected: Vec<_> = (0..MAX_DEPTH).rev().map(name).collect();
    assert!(watched.asked() == expected, "each file once, by its name; no list");
    let refused = open(MAX_DEPTH).unwrap_err();
    assert_eq!((refused.kind, refused.file), (ErrorKind::Parent, format!("/{}", name(MAX_DEPTH))));
    // Here are as many files as a chain may have layers: they are counted by opening them.
    let has_room = |number| Gate::default().has_room(&folder, &name(number)).unwrap();
    assert!(has_room(MAX_DEPTH - 2) && !has_room(MAX_DEPTH - 1));
}

#[test]
fn few_files_leave_room_without_being_opened() {
    let root = Sim::new().root();
    let base = vhdx::create(root.create("base").unwrap(), &Options::dynamic(MIB)).unwrap();
    drop(child(&root, "child", &*base, "base"));
    let watched = Watched::new(root);
    let folder: Arc<dyn Folder> = Arc::<Watched>::clone(&watched);
    assert!(Gate::default().has_room(&folder, "child").unwrap());
    assert_eq!(watched.asked(), ["*"]);
}

/// What an image may say of its parent to have something else opened. `OUTSIDE` stands for the folder in which the parent is.
const HOSTILE: [&str; 41] = [
    r"..\outside\base",
    "../outside/base",
    r".\..\outside\base",
    "./../outside/base",
    r"sub\..\..\outside\base",
    "OUTSIDE/base",
    "/OUTSIDE/base",
    "file://OUTSIDE/base",
    r"C:\outside\base",
    "C:base",
    r"\\server\outside\base",
    r"\\localhost\OUTSIDE\base",
    r"\\?\C:\outside\base",
    r"\\?\UNC\server\outside\base",
    r"\\.\PhysicalDrive0",
    r"\\.\pipe\base",
    "/dev/null",
    "/dev/stdin",
    "/proc/self/fd/0",
    "/etc/passwd",
    "nbd://localhost/base",
    "json:{\"file.filename\":\"/etc/passwd\"}",
    r"sub\base",
    "sub/base",
    "sub",
    "link",
    "LINK",
    r".\link",
    "pipe",
    "device",
    "twin",
    "child",
    "CHILD",
    "..",
    ".",
    r".\",
    "",
    "base\0",
    "\0",
    "line\nbreak",
    "NUL",
];

/// `outside` holds a base, and `own` a child of it that does not say where it lies; and all that a name could lead to instead.
struct Trap {
    place: tempfile::TempDir,
    own: Arc<dyn Folder>,
}

impl Trap {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        for folder in ["outside", "own", "own/sub"] {
            std::fs::create_dir(path(folder)).unwrap();
        }
        let outside: Arc<dyn Folder> = Arc::new(HostFolder::open(&path("outside")).unwrap());
        let own: Arc<dyn Folder> = Arc::new(HostFolder::open(&path("own")).unwrap());
        let base = vhdx::create(outside.create("base").unwrap(), &Options::dynamic(MIB)).unwrap();
        drop(child(&own, "child", &*base, "base"));
        std::fs::hard_link(path("outside/base"), path("own/sub/base")).unwrap();
        std::os::unix::fs::symlink("../outside/base", path("own/link")).unwrap();
        for name in ["Twin", "TWIN"] {
            std::fs::hard_link(path("outside/base"), path("own").join(name)).unwrap();
        }
        let owner = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let node = |name, sort, device| rustix::fs::mknodat(rustix::fs::CWD, path(name), sort, owner, device);
        node("own/pipe", rustix::fs::FileType::Fifo, 0).unwrap();
        // Only root may make one; for others a name that is not there will do.
        let _ = node("own/device", rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(1, 3));
        Self { place, own }
    }

    fn outside(&self) -> Arc<dyn Folder> {
        Arc::new(HostFolder::open(&self.place.path().join("outside")).unwrap())
    }

    /// Writes what the child says of where its parent lies.
    fn say(&self, relative: Option<&str>, absolute: Option<&str>) {
        let layer = image::open(self.own.open("child", Mode::Write).unwrap(), None, Mode::Write).unwrap();
        let text = |path: &str| path.replace("OUTSIDE", &self.place.path().join("outside").display().to_string());
        let (relative_path, absolute_path) = (relative.map(text), absolute.map(text));
        layer.relink(None, Some(ParentLink { relative_path, absolute_path, ..layer.info().parent.unwrap() })).unwrap();
    }

    /// Opens the child by a gate: the layers' files, or why not.
    fn open(&self, own: &Arc<dyn Folder>, gate: &Gate) -> Result<Vec<String>> {
        let layers = gate.open(own, "child", None, Mode::Read)?;
        let file = |layer: &Arc<dyn Layer>| {
            let name = layer.store().name();
            Path::new(&name).strip_prefix(self.place.path()).unwrap().display().to_string()
        };
        Ok(layers.iter().map(file).collect())
    }
}

/// Each name that a folder is asked for has one part, and the folders are all that there is to ask.
#[test]
fn what_an_image_says_is_good_for_names_in_its_own_folder_alone() {
    let mut trap = Trap::new();
    for vhd in [false, true] {
        if vhd {
            let base = vhd::create(trap.outside().create("vhd").unwrap(), &vhd::Options::dynamic(MIB)).unwrap();
            std::fs::rename(trap.place.path().join("outside/vhd"), trap.place.path().join("outside/base")).unwrap();
            trap.own.unlink("child").unwrap();
            let options = vhd::Options::differencing(&*base, "base").unwrap();
            drop(vhd::create(trap.own.create("child").unwrap(), &options).unwrap());
        }
        let watched = Watched::new(Arc::clone(&trap.own));
        let own: Arc<dyn Folder> = Arc::<Watched>::clone(&watched);
        for path in HOSTILE {
            for (relative, absolute) in [(Some(path), None), (None, Some(path)), (Some("none"), Some(path))] {
                trap.say(relative, absolute);
                watched.asked();
                let error = trap.open(&own, &Gate::default()).expect_err(path);
                assert_eq!(error.kind, ErrorKind::Parent, "{path:?}: {error}");
                let asked = watched.asked();
                assert_eq!(asked[0], "child");
                assert!(
                    asked.iter().all(|name| !name.contains(['/', '\\', '\0']) && name != ".."),
                    "{path:?}: {asked:?}"
                );
            }
        }
        trap.own = Arc::new(HostFolder::open(&trap.place.path().join("own")).unwrap());
    }
}

#[test]
fn a_folder_that_is_named_is_looked_into_after_the_childs_own() {
    let trap = Trap::new();
    let gate = Gate::new(vec![trap.outside()]);
    let found = ["outside/base", "own/child"];
    // There the last part of a path is a name.
    for path in ["base", r".\base", "BASE", r"..\elsewhere\base", r"D:\VMs\Base", "/srv/base", r"\\server\share\base"] {
        for (relative, absolute) in [(Some(path), None), (None, Some(path)), (Some("none"), Some(path))] {
            trap.say(relative, absolute);
            assert_eq!(trap.open(&trap.own, &gate).expect(path), found, "{path}");
        }
    }
    // The id decides: what bears the name and is not the parent is passed over.
    drop(vhdx::create(trap.own.create("base").unwrap(), &Options::dynamic(MIB)).unwrap());
    trap.say(Some(r".\base"), None);
    assert_eq!(trap.open(&trap.own, &gate).unwrap(), found);
    let refused = trap.open(&trap.own, &Gate::default()).unwrap_err();
    assert!(refused.to_string().contains("not the parent"), "{refused}");
    // Also if it is the child itself.
    let base = trap.place.path().join("outside");
    std::fs::rename(base.join("base"), base.join("child")).unwrap();
    trap.say(Some(r".\child"), None);
    assert_eq!(trap.open(&trap.own, &gate).unwrap(), ["outside/child", "own/child"]);
    assert!(trap.open(&trap.own, &Gate::default()).unwrap_err().to_string().contains("its own ancestor"));
    // A link leads out of it: it is not followed.
    std::os::unix::fs::symlink("child", base.join("base")).unwrap();
    trap.say(Some(r"..\base"), None);
    assert_eq!(trap.open(&trap.own, &gate).unwrap_err().kind, ErrorKind::Parent);
}

#[test]
fn the_parents_of_a_file_in_a_named_folder_lie_there() {
    let trap = Trap::new();
    let outside = trap.outside();
    let base = image::open(outside.open("base", Mode::Read).unwrap(), None, Mode::Read).unwrap();
    let middle = child(&outside, "middle", &*base, "base");
    trap.own.unlink("child").unwrap();
    drop(child(&trap.own, "child", &*middle, "middle"));
    drop((base, middle));
    let gate = Gate::new(vec![trap.outside()]);
    assert_eq!(trap.open(&trap.own, &gate).unwrap(), ["outside/base", "outside/middle", "own/child"]);
    // The leaf's folder was not named for parents.
    let place = trap.place.path();
    std::fs::rename(place.join("outside/base"), place.join("own/base")).unwrap();
    let missing = trap.open(&trap.own, &gate).unwrap_err();
    assert!(missing.kind == ErrorKind::Parent && missing.file.ends_with("outside/middle"), "{missing}");
    let both = Gate::new(vec![trap.outside(), Arc::clone(&trap.own)]);
    assert_eq!(trap.open(&trap.own, &both).unwrap(), ["own/base", "outside/middle", "own/child"]);
}

#[test]
fn a_circle_is_refused_whichever_way_round() {
    let root = Sim::new().root();
    let base = vhdx::create(root.create("base").unwrap(), &Options::dynamic(MIB)).unwrap();
    let (one, two) = (child(&root, "one", &*base, "base"), child(&root, "two", &*base, "base"));
    let link = |to: &Arc<dyn Layer>, name: &str| ParentLink {
        linkage: to.info().data_id,
        linkage2: None,
        relative_path: Some(name.to_owned()),
        absolute_path: None,
    };
    one.relink(None, Some(link(&two, "two"))).unwrap();
    two.relink(None, Some(link(&one, "ONE"))).unwrap();
    drop((base, one, two));
    // By a second path it is a circle still.
    for gate in [Gate::default(), Gate::new(vec![Arc::clone(&root)])] {
        for (name, mode) in [("one", Mode::Read), ("two", Mode::Read), ("one", Mode::Write), ("two", Mode::Write)] {
            let refused = gate.open(&root, name, None, mode).unwrap_err();
            assert!(refused.to_string().contains("its own ancestor"), "{name}: {refused}");
        }
    }
}
