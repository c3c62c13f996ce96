//! Disk image files, without any machine: made, looked at, hashed, copied, served. What is longer has a file of its own, a verb each.

mod azure;
mod chain;
mod compact;
mod compare;
mod edit;
mod map;
mod merge;
mod qemu;
mod reconnect;
mod resize;

pub(crate) use chain::chain;
pub(crate) use compact::compact;
pub(crate) use compare::compare;
pub(crate) use map::map;
pub(crate) use merge::merge;
pub(crate) use qemu::{convert_from, convert_to, is_qcow2};
pub(crate) use reconnect::reconnect;
pub(crate) use resize::resize;

pub(crate) mod check;

use crate::draw::{self, plain};
use crate::out::Out;
use crate::session::{cancelled, interruptible};
use image::{Access, Chain, Error, ErrorKind, Format, Kind, Layer, vhd, vhdx};
use machine::plan::quoted;
use machine::request::Problem;
use rustix::fs::{CWD, RenameFlags};
use serde::Serialize;
use std::fmt::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::host::HostFolder;
use store::{Folder, Mode, Store};
use tokio::signal::unix::{SignalKind, signal};

/// An image that is there, and the format that it is to be read as.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    path: PathBuf,
    format: Option<Format>,
}

impl Place {
    /// The image at `path`. Its format is what was said, else raw for a name that ends in `.raw`, else what its signature says.
    /// Formats that are not read yet are refused here.
    pub(crate) fn of(path: &Path, said: Option<Format>) -> Result<Self, Problem> {
        let raw = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("raw"));
        let format = said.or(raw.then_some(Format::Raw));
        let store = store::host::open_file(path, Mode::Read).map_err(|error| problem(&error.into()))?;
        match image::open::probe(&*store).map_err(|error| problem(&error))? {
            Some(image::open::Signature::Foreign("qcow2")) if format != Some(Format::Raw) => {
                let (file, new) = (path.display(), path.with_extension("vhdx"));
                let words = [quoted(&file.to_string()), quoted(&new.display().to_string())].join(" ");
                Err(Problem::refused(format!("{file} is a qcow2 image, which can only be converted"))
                    .hint(format!("tenby disk convert {words}")))
            }
            _ => Ok(Self { path: path.to_owned(), format }),
        }
    }

    fn layers(&self, mode: Mode) -> Result<Vec<Arc<dyn Layer>>, Problem> {
        image::open_path(&self.path, self.format, mode).map_err(|error| problem(&error))
    }

    fn chain(&self, access: Access) -> Result<Chain, Problem> {
        let mode = if access == Access::Write { Mode::Write } else { Mode::Read };
        Chain::new(self.layers(mode)?, access).map_err(|error| problem(&error))
    }
}

/// What went wrong with an image, for people.
fn problem(error: &Error) -> Problem {
    let file = shown(&error.file);
    let mut text = format!("{}: {}", file.display(), error.message);
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        // Each says its own part; what the last one said is not said again.
        let said = source.to_string();
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        cause = source.source();
    }
    let wrong_type = error.source.as_ref().is_some_and(|cause| cause.kind == store::ErrorKind::WrongType);
    match error.kind {
        // These verbs are about images that raw files are not.
        ErrorKind::Unsigned if std::env::args().any(|word| ["create", "merge", "reconnect"].contains(&&*word)) => {
            Problem::damaged(text)
        }
        ErrorKind::Unsigned => Problem::damaged(text).hint(format!("{} --from raw      (if it is)", words())),
        ErrorKind::Damaged | ErrorKind::Unsupported | ErrorKind::Parent => Problem::damaged(text),
        _ if wrong_type => Problem::damaged(text),
        ErrorKind::Invalid => Problem::usage(text),
        ErrorKind::Locked => {
            Problem::refused(format!("{} is in use: a machine or another process has it open", file.display()))
        }
        ErrorKind::Exists => Problem::refused(text),
        ErrorKind::NotFound => Problem::not_found(format!("{}: no such file", file.display())),
        ErrorKind::NoSpace => {
            let free = file.parent().and_then(free_space).map(|free| format!(" ({} left)", draw::size(free)));
            Problem::failed(format!("{text}{}", free.unwrap_or_default()))
                .hint("free some space on that file system, then try again")
        }
        _ => Problem::failed(text),
    }
}

/// The command as it was typed, ready to be pasted.
fn words() -> String {
    let words = std::env::args_os().skip(1).map(|word| quoted(&word.to_string_lossy()));
    std::iter::once("tenby".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// Bytes that are left to us on the file system of a folder.
fn free_space(folder: &Path) -> Option<u64> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let stat = rustix::fs::statvfs(folder).ok()?;
    Some(stat.f_bavail * stat.f_frsize)
}

/// A file's name as its user wrote it.
fn shown(name: &str) -> PathBuf {
    PathBuf::from(name.strip_prefix("./").unwrap_or(name))
}

/// What a file is. The contract's `disk info`.
#[derive(Debug, Serialize)]
pub(crate) struct Info {
    file: PathBuf,
    format: &'static str,
    r#type: &'static str,
    size: u64,
    block_size: u32,
    sector_size: u32,
    id: Option<String>,
    parent: Option<Parent>,
    /// Bytes that the file occupies on the host.
    bytes: u64,
    /// The id of the parent that it was made over, if another one was forced on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    forced: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chain: Option<Vec<chain::Link>>,
}

/// The parent as an image names it.
#[derive(Debug, Serialize)]
struct Parent {
    id: String,
    path: Option<String>,
}

impl Info {
    fn of(layer: &dyn Layer) -> Result<Self, Problem> {
        let info = layer.info();
        let bytes = layer.store().allocated().map_err(|error| problem(&error.into()))?;
        Ok(Self {
            file: shown(&layer.store().name()),
            format: match info.format {
                Format::Raw => "raw",
                Format::Vhdx => "vhdx",
                Format::Vhd => "vhd",
            },
            r#type: match info.kind {
                Kind::Fixed => "fixed",
                Kind::Dynamic => "dynamic",
                Kind::Differencing => "differencing",
            },
            size: info.size,
            block_size: info.block_size,
            sector_size: info.sector_size,
            id: (!info.data_id.is_nil()).then(|| info.data_id.to_string()),
            parent: info
                .parent
                .map(|link| Parent { id: link.linkage.to_string(), path: link.relative_path.or(link.absolute_path) }),
            bytes,
            forced: layer.forced().map(|id| id.to_string()),
            chain: None,
        })
    }

    /// For people: a block for each file.
    pub(crate) fn draw(&self, look: &draw::Look) -> String {
        match &self.chain {
            Some(files) => files.iter().map(|link| link.block(look)).collect::<Vec<_>>().join("\n"),
            None => self.block(),
        }
    }

    fn block(&self) -> String {
        let mut lines = vec![
            plain(&self.file.display().to_string()),
            format!("  format    {}, {}", self.format, self.r#type),
            format!(
                "  size      {} ({} bytes), {} on the host",
                draw::size(self.size),
                self.size,
                draw::size(self.bytes)
            ),
            format!("  blocks    {}, sectors of {} bytes", draw::size(self.block_size.into()), self.sector_size),
        ];
        lines.extend(self.id.as_ref().map(|id| format!("  id        {id}")));
        lines.extend(self.parent.as_ref().map(|parent| {
            let path = parent.path.as_deref().map_or("not named".to_owned(), plain);
            format!("  parent    {path} ({})", parent.id)
        }));
        lines.extend(self.forced.as_ref().map(|id| format!("  forced    it was made over {id}")));
        lines.join("\n") + "\n"
    }
}

/// What the file is. The file alone: a missing parent is no reason not to say it.
pub(crate) fn info(place: &Place) -> Result<Info, Problem> {
    let store = store::host::open_file(&place.path, Mode::Read).map_err(|error| problem(&error.into()))?;
    Info::of(&*image::open(store, place.format, Mode::Read).map_err(|error| problem(&error))?)
}

/// A new image, as it was asked for.
#[derive(Debug)]
pub(crate) struct New {
    pub(crate) format: Format,
    pub(crate) size: Option<u64>,
    pub(crate) kind: Kind,
    pub(crate) parent: Option<PathBuf>,
    pub(crate) block_size: Option<u32>,
    pub(crate) sector_size: Option<u32>,
}

/// Makes an empty image. Nothing is left if it fails.
pub(crate) fn create(path: &Path, new: &New, out: &Out) -> Result<Info, Problem> {
    let making = Making::begin(path)?;
    if let Some(size) = new.size {
        azure::note_unfit(new.format, new.kind, size, out, &azure::help_create(path, size));
    }
    let layer: Arc<dyn Layer> = match new.format {
        Format::Raw => {
            if new.parent.is_some() {
                return Err(Problem::usage("a raw image stands on nothing; end its name in .avhdx"));
            }
            image::raw::create(Arc::clone(&making.store), new.size.unwrap_or(0))
                .map_err(|error| making.problem(error))?
        }
        Format::Vhdx => {
            vhdx::create(Arc::clone(&making.store), &options(path, new)?).map_err(|error| making.problem(error))?
        }
        Format::Vhd => {
            vhd::create(Arc::clone(&making.store), &vhd_options(path, new)?).map_err(|error| making.problem(error))?
        }
    };
    layer.close().map_err(|error| making.problem(error))?;
    drop(layer);
    making.finish()?;
    info(&Place { path: path.to_owned(), format: (new.format == Format::Raw).then_some(Format::Raw) })
}

fn options(path: &Path, new: &New) -> Result<vhdx::Options, Problem> {
    let mut options = match &new.parent {
        Some(parent) => {
            let (parent, name) = parent_of(path, parent)?;
            vhdx::Options::differencing(&*parent, &name).map_err(|error| problem(&error))?
        }
        None => vhdx::Options { kind: new.kind, ..vhdx::Options::dynamic(new.size.unwrap_or(0)) },
    };
    options.size = new.size.unwrap_or(options.size);
    options.block_size = new.block_size.unwrap_or(options.block_size);
    options.sector_size = new.sector_size.unwrap_or(options.sector_size);
    Ok(options)
}

fn vhd_options(path: &Path, new: &New) -> Result<vhd::Options, Problem> {
    if new.sector_size.is_some_and(|size| size != 512) {
        return Err(Problem::usage("a VHD has sectors of 512 bytes; end its name in .vhdx for others"));
    }
    let mut options = match &new.parent {
        Some(parent) => {
            let (parent, name) = parent_of(path, parent)?;
            vhd::Options::differencing(&*parent, &name).map_err(|error| problem(&error))?
        }
        None => vhd::Options { kind: new.kind, ..vhd::Options::dynamic(new.size.unwrap_or(0)) },
    };
    options.size = new.size.unwrap_or(options.size);
    options.block_size = new.block_size.unwrap_or(options.block_size);
    Ok(options)
}

/// The name of `parent`, which must lie beside `path`: a parent elsewhere would never be opened.
fn beside(path: &Path, parent: &Path) -> Result<String, Problem> {
    let folder = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::canonicalize(folder).map_err(|error| Problem::not_found(format!("{}: {error}", folder.display())))
    };
    if folder(path)? != folder(parent)? {
        let message = format!(
            "{} must lie in the same folder as {}: no image names a parent elsewhere",
            parent.display(),
            path.display()
        );
        return Err(Problem::usage(message));
    }
    let name = parent.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| Problem::usage(format!("{}: not UTF-8", parent.display())))
}

/// The image that another one at `path` is to stand on, and its name.
fn parent_of(path: &Path, parent: &Path) -> Result<(Arc<dyn Layer>, String), Problem> {
    let place = Place::of(parent, None)?;
    let name = beside(path, parent)?;
    let parent =
        place.layers(Mode::Read)?.pop().ok_or_else(|| Problem::failed("an image is a chain of one at least"))?;
    Ok((parent, name))
}

/// A hash. The contract's `disk hash`.
#[derive(Debug, Serialize)]
pub(crate) struct Hash {
    pub(crate) sha256: String,
}

/// The hash of all the content.
pub(crate) async fn hash(place: Place, out: &Out) -> Result<Hash, Problem> {
    let what = format!("hashing {}", place.path.display());
    let hash = interruptible(out, what, move |progress| {
        image::convert::hash(&place.chain(Access::Read)?, progress).map_err(|error| problem(&error))
    })
    .await?;
    let hash = hash.ok_or_else(|| cancelled("the hash was cancelled"))?;
    let mut sha256 = String::with_capacity(64);
    for byte in hash {
        write!(sha256, "{byte:02x}").expect("writing to a string never fails");
    }
    Ok(Hash { sha256 })
}

/// A new image to copy into.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) path: &'a Path,
    pub(crate) format: Format,
    /// Dynamic, unless something else is said.
    pub(crate) kind: Option<Kind>,
    /// All of the file takes space.
    pub(crate) dense: bool,
    /// The size is one that Azure takes; the format is VHD then, and the kind fixed.
    pub(crate) azure: bool,
}

impl Target<'_> {
    /// What the finished file is.
    fn info(&self) -> Result<Info, Problem> {
        let format = (self.format == Format::Raw).then_some(Format::Raw);
        info(&Place { path: self.path.to_owned(), format })
    }

    /// The disk's size, if the source has `size` bytes.
    fn size(&self, size: u64, out: &Out) -> Result<u64, Problem> {
        if self.azure {
            return azure::fit(size, self.path, out);
        }
        azure::note_unfit(self.format, self.kind.unwrap_or(Kind::Dynamic), size, out, &azure::help_convert());
        Ok(size)
    }

    fn cancelled(&self) -> Problem {
        cancelled(format!("the copy was cancelled; {} was not made", self.path.display()))
    }
}

/// An empty image in an empty file, to be copied into.
fn blank(
    store: &Arc<dyn Store>,
    format: Format,
    kind: Option<Kind>,
    size: u64,
    sector_size: u32,
) -> Result<Chain, Error> {
    let store = Arc::clone(store);
    let layer: Arc<dyn Layer> = match format {
        Format::Raw => image::raw::create(store, size)?,
        Format::Vhdx => {
            let kind = kind.unwrap_or(Kind::Dynamic);
            vhdx::create(store, &vhdx::Options { kind, sector_size, ..vhdx::Options::dynamic(size) })?
        }
        Format::Vhd => {
            let kind = kind.unwrap_or(Kind::Dynamic);
            vhd::create(store, &vhd::Options { kind, ..vhd::Options::dynamic(size) })?
        }
    };
    Chain::new(vec![layer], Access::Write)
}

/// Copies an image into a new file. Nothing is left if it fails or is cancelled.
pub(crate) async fn convert(source: Place, target: Target<'_>, out: &Out) -> Result<Info, Problem> {
    let making = Making::begin(target.path)?;
    let store = Arc::clone(&making.store);
    let what = format!("copying {}", source.path.display());
    let Target { format, kind, dense, .. } = target;
    let file = target.path.to_owned();
    let source = source.chain(Access::Read)?;
    let size = target.size(source.size(), out)?;
    let complete = interruptible(out, what, move |progress| {
        let copied = blank(&store, format, kind, size, source.sector_size()).and_then(|target| {
            let complete = image::convert::copy(&source, &target, progress)?;
            target.close()?;
            Ok(complete && (!dense || image::convert::fill(&*store, progress)?))
        });
        copied.map_err(|error| edit::copy_problem(&error, &source, &*store, &file))
    })
    .await?;
    if !complete {
        return Err(target.cancelled());
    }
    making.finish()?;
    target.info()
}

/// A file that is being made: under a name of its own until it is complete, and gone if it never is.
struct Making {
    folder: HostFolder,
    store: Arc<dyn Store>,
    path: PathBuf,
    partial: String,
    complete: bool,
}

impl Making {
    fn begin(path: &Path) -> Result<Self, Problem> {
        if std::fs::symlink_metadata(path).is_ok() {
            return Err(Self::exists(path));
        }
        let (folder, _) = HostFolder::holding(path).map_err(|error| problem(&error.into()))?;
        let partial = format!(".tenby-{}.part", uuid::Uuid::new_v4().simple());
        let store = folder.create(&partial).map_err(|error| problem(&error.into()))?;
        Ok(Self { folder, store, path: path.to_owned(), partial, complete: false })
    }

    fn exists(path: &Path) -> Problem {
        Problem::refused(format!("{} exists already; nothing was changed", path.display()))
    }

    /// What went wrong, told of the file that was to be.
    fn problem(&self, error: Error) -> Problem {
        let file = if error.file == self.store.name() { self.path.display().to_string() } else { error.file };
        problem(&Error { file, ..error })
    }

    /// Gives the file its name, durably. A file that has come to bear that name meanwhile stays.
    fn finish(mut self) -> Result<(), Problem> {
        let partial = self.folder.path().join(&self.partial);
        match rustix::fs::renameat_with(CWD, &partial, CWD, &self.path, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(Self::exists(&self.path)),
            Err(error) => {
                return Err(Problem::failed(format!("{}: {}", self.path.display(), std::io::Error::from(error))));
            }
        }
        self.complete = true;
        self.folder.sync().map_err(|error| problem(&error.into()))
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if !self.complete {
            // If even that fails, a file of a telling name stays behind; there is nothing more to do about it.
            let _ = self.folder.unlink(&self.partial);
        }
    }
}

/// Where a disk is served.
#[derive(Debug)]
pub(crate) enum At {
    /// On a unix socket.
    Socket(PathBuf),
    /// On a TCP port of the loopback; 0 is any.
    Port(u16),
}

/// A service's address. With `--json`.
#[derive(Debug, Serialize)]
struct Served {
    uri: String,
}

/// Serves the image until SIGTERM or Ctrl-C; then everything is flushed and the socket removed.
pub(crate) async fn serve(place: &Place, at: At, read_only: bool, out: &Out) -> Result<(), Problem> {
    if !read_only {
        edit::check_owner(&place.path)?;
    }
    let failed = |what: &str, error: &dyn std::fmt::Display| Problem::failed(format!("{what}: {error}"));
    let hear = |kind| signal(kind).map_err(|error| failed("signals cannot be heard", &error));
    let (mut terminate, mut interrupt) = (hear(SignalKind::terminate())?, hear(SignalKind::interrupt())?);
    let chain = Arc::new(place.chain(if read_only { Access::Read } else { Access::Write })?);
    if !read_only {
        edit::check_leaf(place, chain.layers().last().expect("an image is a chain of one at least"), out)?;
    }
    let options = export::Options { read_only, ..export::Options::default() };
    let (listener, uri): (export::Listener, String) = match &at {
        At::Socket(path) => {
            let listener = export::listen_unix(path).map_err(|error| refused(&error))?;
            let path = std::path::absolute(path).map_err(|error| failed("the socket", &error))?;
            (listener.into(), export::uri(&path))
        }
        At::Port(port) => {
            let listener =
                TcpListener::bind(("127.0.0.1", *port)).map_err(|error| failed(&format!("port {port}"), &error))?;
            let address = listener.local_addr().map_err(|error| failed("the port", &error))?;
            (listener.into(), format!("nbd://{address}/"))
        }
    };
    let served = export::Export::serve(Arc::clone(&chain), listener, options).map_err(|error| refused(&error))?;
    out.show(&Served { uri: uri.clone() }, |_| format!("{uri}\n"));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let ended = tokio::task::spawn_blocking(move || {
        served.stop();
        chain.close()
    });
    let closed = ended.await.map_err(|error| failed("the end", &error))?;
    if let At::Socket(path) = &at {
        // The disk is safe; a socket that stays behind is replaced by the next one.
        let _ = std::fs::remove_file(path);
    }
    closed.map_err(|error| problem(&error))
}

fn refused(error: &export::Error) -> Problem {
    let text = match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    match error.kind {
        export::ErrorKind::InUse => Problem::refused(text),
        export::ErrorKind::NotFound => Problem::not_found(text),
        _ => Problem::failed(text),
    }
}
