//! What is opened for a hostile image: watched from outside, system call by system call (`strace`).

mod place;

use image::vhdx::{self, Options};
use image::{Layer, ParentLink, vhd};
use place::{Ended, Place, can_watch};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use store::host::{HostFolder, open_file};
use store::{Folder, Mode};

const MIB: u64 = 1 << 20;

/// What an image may say of its parent to have something else opened. `OUTSIDE` stands for the folder in which the parent is, and
/// `outside` for that folder beside the image's.
const HOSTILE: [&str; 24] = [
    r"..\outside\base",
    "../outside/base",
    r".\..\outside\base",
    r"sub\..\..\outside\base",
    "OUTSIDE/base",
    "file://OUTSIDE/base",
    r"C:\outside\base",
    r"\\server\outside\base",
    r"\\?\OUTSIDE\base",
    r"\\.\PhysicalDrive0",
    "/dev/null",
    "/dev/tty",
    "/proc/self/fd/0",
    "/etc/passwd",
    "sub/base",
    "sub",
    "link",
    "LINK",
    "pipe",
    "device",
    "child.avhdx",
    "CHILD.avhdx",
    "..",
    "OUTSIDE/base\0.vhdx",
];

/// A folder `own` with a child, whose parent lies in `outside`; and all that a name could lead to instead.
struct Trap {
    place: Place,
}

impl Trap {
    fn new() -> Self {
        let trap = Self { place: Place::new() };
        for folder in ["outside", "own", "own/sub"] {
            fs::create_dir(trap.path(folder)).unwrap();
        }
        drop(vhdx::create(trap.folder("outside").create("base").unwrap(), &Options::dynamic(MIB)).unwrap());
        drop(vhd::create(trap.folder("outside").create("vhd").unwrap(), &vhd::Options::dynamic(MIB)).unwrap());
        drop(vhdx::create(trap.folder("own").create("sound.vhdx").unwrap(), &Options::dynamic(MIB)).unwrap());
        fs::hard_link(trap.path("outside/base"), trap.path("own/sub/base")).unwrap();
        std::os::unix::fs::symlink("../outside/base", trap.path("own/link")).unwrap();
        let owner = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let node = |name, sort, device| rustix::fs::mknodat(rustix::fs::CWD, trap.path(name), sort, owner, device);
        node("own/pipe", rustix::fs::FileType::Fifo, 0).unwrap();
        // Only root may make one; for others a name that is not there will do.
        let _ = node("own/device", rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(1, 3));
        trap
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.dir.path().canonicalize().unwrap().join(name)
    }

    fn folder(&self, name: &str) -> HostFolder {
        HostFolder::open(&self.path(name)).unwrap()
    }

    /// Makes the child, a VHDX or a VHD, and has it say this of where its parent lies.
    fn child(&self, vhd: bool, says: &str) {
        let own = self.folder("own");
        let _ = own.unlink("child.avhdx");
        let base = open_file(&self.path(if vhd { "outside/vhd" } else { "outside/base" }), Mode::Read).unwrap();
        let base = image::open(base, None, Mode::Read).unwrap();
        let store = own.create("child.avhdx").unwrap();
        let layer: Arc<dyn Layer> = match vhd {
            true => vhd::create(store, &vhd::Options::differencing(&*base, "base").unwrap()).unwrap(),
            false => vhdx::create(store, &Options::differencing(&*base, "base").unwrap()).unwrap(),
        };
        let path = says.replace("OUTSIDE", &self.path("outside").display().to_string());
        let link = layer.info().parent.unwrap();
        let link = ParentLink { relative_path: Some(path.clone()), absolute_path: Some(path), ..link };
        layer.relink(None, Some(link)).unwrap();
        layer.close().unwrap();
    }

    /// Runs a command in `own`, and says which paths it has tried to open.
    fn watch(&self, words: &[&str]) -> (Ended, BTreeSet<PathBuf>) {
        let log = self.path("trace");
        let traced = "trace=open,openat,openat2,creat,name_to_handle_at,open_by_handle_at";
        let command = self.place.command(words);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-y", "-s", "4096", "-e", traced, "-o"]).arg(&log);
        strace.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            strace.env(name, value.unwrap_or_default());
        }
        // With an arena for each thread the C library reads a setting of the kernel whenever one gives memory back: not each time.
        strace.env("MALLOC_ARENA_MAX", "1");
        let ended = strace.current_dir(self.path("own")).stdin(std::process::Stdio::null()).output().unwrap().into();
        let trace = fs::read_to_string(&log).unwrap();
        let calls = trace.lines().filter(|line| line.contains('"'));
        (ended, calls.map(|line| opened(line).unwrap_or_else(|| panic!("not understood: {line}"))).collect())
    }
}

/// The path that a traced call has tried to open: `openat2(5</folder>, "name", …) = 6</folder/name>`.
fn opened(line: &str) -> Option<PathBuf> {
    let (_, rest) = line.split_once('(')?;
    let (before, rest) = rest.split_once('"')?;
    let (name, _) = rest.split_once('"')?;
    // `open` and `creat` begin with the name; the others with a folder, `5</folder>` or `AT_FDCWD</folder>`.
    let folder = before.split_once('<').and_then(|(_, rest)| rest.rsplit_once('>')).map_or("/", |(folder, _)| folder);
    let mut path = PathBuf::new();
    for part in Path::new(folder).join(name).components() {
        match part {
            Component::ParentDir => drop(path.pop()),
            Component::CurDir => {}
            part => path.push(part),
        }
    }
    Some(path)
}

/// The verbs that open a chain, on the child.
const VERBS: [&[&str]; 13] = [
    &["disk", "hash", "child.avhdx"],
    &["disk", "info", "child.avhdx"],
    &["disk", "info", "child.avhdx", "--chain"],
    &["disk", "map", "child.avhdx"],
    &["disk", "check", "child.avhdx"],
    &["disk", "compare", "child.avhdx", "sound.vhdx"],
    &["disk", "convert", "child.avhdx", "new.raw"],
    &["disk", "resize", "child.avhdx", "2M"],
    &["disk", "compact", "child.avhdx"],
    &["disk", "merge", "child.avhdx"],
    &["disk", "merge", "child.avhdx", "--into", "new.vhdx"],
    &["disk", "reconnect", "child.avhdx", "sound.vhdx"],
    &["disk", "serve", "child.avhdx", "--socket", "socket"],
];

/// What of `opened` lies neither in the image's own folder nor is opened for a sound image too.
fn astray<'a>(trap: &Trap, opened: &'a BTreeSet<PathBuf>, usual: &BTreeSet<PathBuf>) -> Vec<&'a PathBuf> {
    let own = trap.path("own");
    let forbidden = ["link", "pipe", "device", "sub"].map(|name| own.join(name));
    let fine = |path: &Path| {
        (path.starts_with(&own) && !forbidden.iter().any(|name| path.starts_with(name))) || usual.contains(path)
    };
    opened.iter().filter(|path| !fine(path)).collect()
}

#[test]
fn nothing_outside_is_opened_whatever_an_image_says() {
    if !can_watch() {
        return;
    }
    let trap = Trap::new();
    let (sound, usual) = trap.watch(&["disk", "hash", "sound.vhdx"]);
    sound.well();
    assert!(usual.contains(&trap.path("own/sound.vhdx")), "the watch works: {usual:?}");
    for vhd in [false, true] {
        for says in HOSTILE {
            trap.child(vhd, says);
            let (ended, opened) = trap.watch(&["disk", "hash", "child.avhdx"]);
            let ended = ended.with(5);
            assert!(ended.err.starts_with("error: ") && ended.err.contains("child.avhdx"), "{ended:?}");
            assert_eq!(astray(&trap, &opened, &usual), <[&PathBuf; 0]>::default(), "{says:?}: {ended:?}");
        }
    }
}

#[test]
fn no_verb_opens_what_lies_outside() {
    if !can_watch() {
        return;
    }
    let trap = Trap::new();
    for words in VERBS {
        let sound: Vec<&str> =
            words.iter().map(|word| if *word == "child.avhdx" { "usual.vhdx" } else { word }).collect();
        fs::copy(trap.path("own/sound.vhdx"), trap.path("own/usual.vhdx")).unwrap();
        let usual = if words[1] == "serve" { BTreeSet::new() } else { trap.watch(&sound).1 };
        for new in ["usual.vhdx", "new.raw", "new.vhdx"] {
            let _ = fs::remove_file(trap.path("own").join(new));
        }
        let usual: BTreeSet<_> = usual.into_iter().chain(trap.watch(&["disk", "hash", "sound.vhdx"]).1).collect();
        for says in ["../outside/base", "link"] {
            trap.child(false, says);
            let before = place::content(&trap.path("."));
            let (ended, opened) = trap.watch(words);
            // What looks at the file alone has nothing to refuse.
            let alone = matches!(words, [_, "info" | "check", _] | [_, "reconnect", ..]);
            assert!(alone || ended.code == 5, "{words:?}: {ended:?}");
            assert_eq!(astray(&trap, &opened, &usual), <[&PathBuf; 0]>::default(), "{words:?}: {ended:?}");
            let after = place::content(&trap.path("."));
            let changed = |all: &[(PathBuf, Vec<u8>)]| {
                all.iter().filter(|(path, _)| !path.ends_with("trace")).cloned().collect::<Vec<_>>()
            };
            assert!(changed(&before) == changed(&after), "{words:?} has changed something");
        }
    }
}

/// A folder that was named is one that may be looked into: the same image opens.
#[test]
fn a_folder_is_named_for_parents() {
    let trap = Trap::new();
    let tenby = |words: &[&str]| -> Ended {
        let mut command = trap.place.command(words);
        command.current_dir(trap.path("own")).output().unwrap().into()
    };
    trap.child(false, r"D:\VMs\outside\base");
    let outside = trap.path("outside").display().to_string();
    let lost = tenby(&["disk", "hash", "child.avhdx"]).with(5);
    assert!(lost.err.contains("hint: tenby disk hash child.avhdx --parents FOLDER"), "{lost:?}");
    for words in VERBS.iter().filter(|words| !["merge", "reconnect", "serve", "check"].contains(&words[1])) {
        let words: Vec<&str> =
            words.iter().copied().chain(["--parents", "sub", "--parents", &outside, "--json"]).collect();
        let ended = tenby(&words);
        assert!(ended.code == 0, "{words:?}: {ended:?}");
        if words.contains(&"--chain") {
            let chain = ended.json()["chain"].clone();
            assert_eq!(chain.as_array().unwrap().len(), 2);
            assert!(chain[0]["children"][0] == "child.avhdx" && chain[0]["deletable"] == false, "{chain}");
        }
    }
}

/// A base in one folder, its child in another: made, read, guarded, merged and copied in by those who say where the parents lie.
#[test]
fn a_chain_lies_in_two_folders() {
    let place = Place::new();
    let tenby = |words: &[&str]| place.tenby(words);
    for folder in ["bases", "work"] {
        fs::create_dir(place.path(folder)).unwrap();
    }
    fs::write(place.path("a.raw"), vec![7; 1 << 20]).unwrap();
    tenby(&["disk", "convert", "a.raw", "bases/base.vhdx"]).well();
    let create = ["disk", "create", "work/child.avhdx", "--parent", "bases/base.vhdx"];
    let refused = tenby(&create).with(2);
    assert!(refused.err.contains("--parents bases"), "{refused:?}");
    assert!(!Path::new(&place.path("work/child.avhdx")).exists());
    let with = |words: &[&str]| tenby(&[words, &["--parents", "bases", "--parents", "work"]].concat());
    with(&create).well();
    with(&["disk", "create", "work/leaf.avhdx", "--parent", "work/child.avhdx"]).well();
    with(&["disk", "compare", "work/leaf.avhdx", "a.raw"]).well();
    // What stands on an image is seen in every folder that was named.
    let refused = with(&["disk", "resize", "bases/base.vhdx", "2M"]).with(3);
    assert!(refused.err.contains("work/child.avhdx stands on"), "{refused:?}");
    let chain = with(&["disk", "info", "work/leaf.avhdx", "--chain", "--json"]).well().json()["chain"].clone();
    assert_eq!((&chain[0]["file"], &chain[0]["children"][0]), (&"bases/base.vhdx".into(), &"work/child.avhdx".into()));
    assert_eq!(chain[1]["children"][0], "leaf.avhdx");
    // A machine's disk is copied in with all that it stands on.
    let vm = |disk: &str| tenby(&["vm", "create", "web", "--memory", "64M", "--disk", disk]);
    let refused = vm("work/leaf.avhdx").with(5);
    assert!(refused.err.contains(",parents=FOLDER"), "{refused:?}");
    vm("work/leaf.avhdx,parents=work,parents=bases").well();
    let own = place.machine("web")["disks"][0]["file"].as_str().unwrap().to_owned();
    tenby(&["disk", "compare", &own, "a.raw"]).well();
    // The middle one goes; what stood on it stands on the base, over there.
    with(&["disk", "merge", "work/child.avhdx"]).well();
    with(&["disk", "compare", "work/leaf.avhdx", "a.raw"]).well();
    fs::rename(place.path("bases/base.vhdx"), place.path("bases/other.vhdx")).unwrap();
    with(&["disk", "compare", "work/leaf.avhdx", "a.raw"]).with(5);
    with(&["disk", "reconnect", "work/leaf.avhdx", "bases/other.vhdx"]).well();
    with(&["disk", "merge", "work/leaf.avhdx"]).well();
    tenby(&["disk", "compare", "bases/other.vhdx", "a.raw"]).well();
    for folder in ["a.raw", "none"] {
        let refused = tenby(&["disk", "hash", "a.raw", "--parents", folder]);
        assert!([4, 5].contains(&refused.code) && refused.err.contains(folder), "{refused:?}");
    }
}

/// A link that the user names leads to the image, and its parents lie beside that.
#[test]
fn a_users_own_link_is_followed() {
    let place = Place::new();
    fs::create_dir(place.path("work")).unwrap();
    place.tenby(&["disk", "create", "work/base.vhdx", "--size", "8M"]).well();
    place.tenby(&["disk", "create", "work/child.avhdx", "--parent", "work/base.vhdx"]).well();
    std::os::unix::fs::symlink("work/child.avhdx", place.path("link")).unwrap();
    for words in [
        &["disk", "hash", "link"][..],
        &["disk", "info", "link", "--chain"],
        &["disk", "resize", "link", "16M"],
        &["disk", "compact", "link"],
        &["disk", "check", "link", "--repair"],
        &["disk", "create", "work/leaf.avhdx", "--parent", "link"],
        &["vm", "create", "web", "--memory", "64M", "--disk", "link"],
        &["disk", "hash", "work/leaf.avhdx"],
    ] {
        place.tenby(words).well();
    }
}
