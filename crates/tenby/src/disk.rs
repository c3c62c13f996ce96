//! Disk image files, without any machine: made, looked at, hashed, copied, served. What is longer has a file of its own, a verb each.

mod azure;
mod chain;
mod compact;
mod compare;
mod edit;
mod map;
mod merge;
mod place;
mod problem;
mod qemu;
mod reconnect;
mod resize;
mod work;

pub(crate) use chain::chain;
pub(crate) use compact::compact;
pub(crate) use compare::compare;
pub(crate) use map::map;
pub(crate) use merge::merge;
pub(crate) use place::{Parents, Place};
pub(crate) use qemu::{convert_from, convert_to, is_qcow2};
pub(crate) use reconnect::reconnect;
pub(crate) use resize::resize;

pub(crate) mod check;

use crate::draw::{self, plain};
use crate::out::Out;
use crate::session::cancelled;
use image::{Access, Chain, Error, Format, Kind, Layer, vhd, vhdx};
use machine::plan::quoted;
use machine::request::Problem;
use problem::{copy_problem, problem, unmade, words};
use serde::Serialize;
use std::fmt::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::host::{HostFolder, NewFile};
use store::{Mode, Store};
use tokio::signal::unix::{SignalKind, signal};
use work::interruptible;

/// The folder that a file lies in, and its name there.
fn holding(path: &Path) -> Result<(HostFolder, String), Problem> {
    HostFolder::holding(path).map_err(|error| problem(&error.into()))
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
    Info::of(&*place.alone(Mode::Read)?)
}

/// What a file is that was just made.
fn info_of_new(path: &Path, format: Format) -> Result<Info, Problem> {
    let format = (format == Format::Raw).then_some(Format::Raw);
    info(&Place { path: path.to_owned(), format, parents: Parents::default() })
}

/// A new image, as it was asked for.
#[derive(Debug)]
pub(crate) struct New {
    pub(crate) format: Format,
    pub(crate) size: Option<u64>,
    pub(crate) kind: Kind,
    /// The image that it stands on.
    pub(crate) parent: Option<Place>,
    pub(crate) block_size: Option<u32>,
    pub(crate) sector_size: Option<u32>,
}

/// Makes an empty image. Nothing is left if it fails.
pub(crate) fn create(path: &Path, new: &New, out: &Out) -> Result<Info, Problem> {
    let file = begin(path, true)?;
    if let Some(size) = new.size {
        azure::note_unfit(new.format, new.kind, size, out, &azure::help_create(path, size));
    }
    let made = match new.format {
        Format::Raw if new.parent.is_some() => {
            return Err(Problem::usage("a raw image stands on nothing; end its name in .avhdx"));
        }
        Format::Raw => image::raw::create(file.store(), new.size.unwrap_or(0)).map(|layer| layer as Arc<dyn Layer>),
        Format::Vhdx => vhdx::create(file.store(), &options(path, new)?).map(|layer| layer as Arc<dyn Layer>),
        Format::Vhd => vhd::create(file.store(), &vhd_options(path, new)?).map(|layer| layer as Arc<dyn Layer>),
    };
    made.and_then(|layer| layer.close()).map_err(|error| problem(&error))?;
    finish(file, path)?;
    info_of_new(path, new.format)
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

/// The name of an image that one at `child` is to stand on: it must lie where it will be looked for, beside the child or in a folder that
/// was named.
fn name_below(child: &Path, parent: &Place) -> Result<String, Problem> {
    let ((own, _), (folder, name)) = (holding(child)?, holding(&parent.path)?);
    if own.is(&folder) || parent.parents.has(&folder) {
        return Ok(name);
    }
    let message = format!(
        "{} does not lie in the folder of {}: there it is found only if somebody says where it is",
        parent.path.display(),
        child.display()
    );
    let above = shown(&folder.path().display().to_string()).display().to_string();
    Err(Problem::usage(message).hint(format!("{} --parents {}", words(), quoted(&above))))
}

/// The image that another one at `path` is to stand on, and its name. What that one stands on is not opened: it need not be known.
fn parent_of(path: &Path, parent: &Place) -> Result<(Arc<dyn Layer>, String), Problem> {
    let name = name_below(path, parent)?;
    let layer = parent.alone(Mode::Read)?;
    let file = parent.path.display().to_string();
    if layer.info().data_id.is_nil() {
        let new = parent.path.with_extension("vhdx").display().to_string();
        let message = format!("{file} has no id by which a child could know it, and see that it was not changed");
        return Err(Problem::refused(message).hint(format!("tenby disk convert {} {}", quoted(&file), quoted(&new))));
    }
    let (folder, own) = parent.folder()?;
    if !parent.parents.gate().has_room(&folder, &own).map_err(|error| place::chain_problem(&error))? {
        return Err(Problem::refused(format!("{file} stands on so many others that nothing can stand on it"))
            .hint(format!("tenby disk merge {}", quoted(&file))));
    }
    Ok((layer, name))
}

/// A hash. The contract's `disk hash`.
#[derive(Debug, Serialize)]
pub(crate) struct Hash {
    pub(crate) sha256: String,
}

/// The hash of all the content.
pub(crate) async fn hash(place: Place, out: &Out) -> Result<Hash, Problem> {
    edit::check_still(&place.path, out).await?;
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
    /// It is to be durable when it is there.
    pub(crate) durable: bool,
    /// The size is one that Azure takes; the format is VHD then, and the kind fixed.
    pub(crate) azure: bool,
}

impl Target<'_> {
    /// What the finished file is.
    fn info(&self) -> Result<Info, Problem> {
        info_of_new(self.path, self.format)
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
    edit::check_still(&source.path, out).await?;
    let new = begin(target.path, target.durable)?;
    let store = new.store();
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
        copied.map_err(|error| copy_problem(&error, &source, &*store, &file))
    })
    .await?;
    if !complete {
        return Err(target.cancelled());
    }
    finish(new, target.path)?;
    target.info()
}

/// Begins a new file; see [`NewFile`].
fn begin(path: &Path, durable: bool) -> Result<NewFile, Problem> {
    NewFile::begin(path, durable).map_err(|error| unmade(error, path))
}

/// Gives a new file its name.
fn finish(file: NewFile, path: &Path) -> Result<(), Problem> {
    file.finish().map_err(|error| unmade(error, path))
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
    match read_only {
        true => edit::check_still(&place.path, out).await?,
        false => edit::check_owner(&place.path, out).await?,
    }
    let failed = |what: &str, error: &dyn std::fmt::Display| Problem::failed(format!("{what}: {error}"));
    let hear = |kind| signal(kind).map_err(|error| failed("signals cannot be heard", &error));
    let (mut terminate, mut interrupt) = (hear(SignalKind::terminate())?, hear(SignalKind::interrupt())?);
    let chain = Arc::new(place.chain(if read_only { Access::Read } else { Access::Write })?);
    if !read_only {
        edit::check_leaf(place, &**chain.layers().last().expect("an image is a chain of one at least"), out)?;
    }
    let options = export::Options { read_only, ..export::Options::default() };
    let (listener, uri): (export::Listener, String) = match &at {
        At::Socket(path) => {
            let listener = export::listen_unix(path).map_err(|error| refused(&error))?;
            let path = std::path::absolute(path).map_err(|error| failed("the socket", &error))?;
            (listener.into(), format!("nbd+unix:///?socket={}", escaped(&path.display().to_string())))
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

/// A path as part of a URI's query (RFC 3986).
fn escaped(path: &str) -> String {
    let kept = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    path.bytes().map(|byte| if kept(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
