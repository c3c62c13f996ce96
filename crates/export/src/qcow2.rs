//! qcow2, which is QEMU's own format: `qemu-img` reads and writes it, from and to a disk that we serve.
//!
//! ```text
//!   file.qcow2 ──► qemu-img convert ──► NBD ──► Chain        copy_in
//!   file.qcow2 ◄── qemu-img convert ◄── NBD ◄── Chain        copy_out
//! ```
//!
//! `qemu-img` opens nothing but what it is told to: a qcow2 that names another file is refused before it sees it.

use crate::{Export, Listener, Options, listen_unix};
use image::{Chain, open::Signature};
use std::fs::DirBuilder;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use store::{Mode, Store};

/// How often the copy is asked how far it is.
const PATIENCE: Duration = Duration::from_millis(50);
/// How much of what the tool says about a failure is kept, bytes.
const WORDS: u64 = 4096;
/// An incompatible feature of a qcow2: its data lie in another file.
const EXTERNAL_DATA: u64 = 1 << 2;
/// The largest disk that is copied, bytes: that of a VHDX.
const MAX_SIZE: u64 = 64 << 40;

/// Why a qcow2 was not copied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is damaged.
    #[error("{}: {what}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The file does not stand alone: it names others, which are not opened.
    #[error("{}: {what}, whose name in it is not followed", file.display())]
    NamesOthers {
        /// The file.
        file: PathBuf,
        /// What it names.
        what: &'static str,
    },
    /// There is no `qemu-img` here.
    #[error("qcow2 is read and written with qemu-img, which is not installed")]
    NotInstalled,
    /// `qemu-img` failed, and said this.
    #[error("qemu-img: {0}")]
    Tool(String),
    /// The image on our side failed, or the file cannot be read.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// It could not be served.
    #[error(transparent)]
    Serve(#[from] crate::Error),
    /// What else the system said.
    #[error("{0}: {1}")]
    System(String, #[source] io::Error),
}

impl Error {
    /// Whether it is for want of space. `qemu-img` says that in words alone.
    pub fn is_no_room(&self) -> bool {
        match self {
            Self::Tool(words) => words.contains("No space left on device"),
            Self::Image(error) => error.kind == image::ErrorKind::NoSpace,
            _ => false,
        }
    }
}

/// The result of copying.
pub type Result<T> = std::result::Result<T, Error>;

/// Told how many bytes of how many are done; `false` stops.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// Whether a file says that it is a qcow2.
pub fn is_one(path: &Path) -> Result<bool> {
    let store = open(path)?;
    Ok(image::open::probe(&*store)? == Some(Signature::Foreign("qcow2")))
}

/// A qcow2 that stands alone.
#[derive(Debug)]
pub struct Qcow2 {
    path: PathBuf,
    size: u64,
}

impl Qcow2 {
    /// The qcow2 at `path`. One that names other files is refused: no path from an image is opened.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), size: size(path)? })
    }

    /// The disk's size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Copies the content into `target`, which is new (it reads as zeros) and at least as large; it is neither flushed nor closed. Says
    /// whether it came to the end: `false` if `progress` stopped it, and then the target is to be thrown away.
    pub fn copy_in(&self, target: &Arc<Chain>, progress: Progress<'_>) -> Result<bool> {
        let served = Served::begin(target, false)?;
        let mut tool = Command::new("qemu-img");
        let source = source_options(&self.path)?;
        tool.args(["convert", "-p", "-n", "--target-is-zero", "--image-opts", "-O", "raw", &source, &served.uri]);
        run(&mut tool, self.size, progress)
    }
}

/// Copies the content of `source` into the file at `target`, which is empty: a qcow2 is made of it, not synced. Says whether it came to
/// the end, as [`Qcow2::copy_in`] does.
pub fn copy_out(source: &Arc<Chain>, target: &Path, progress: Progress<'_>) -> Result<bool> {
    let served = Served::begin(source, true)?;
    let mut tool = Command::new("qemu-img");
    tool.args(["convert", "-p", "-f", "raw", "-O", "qcow2", &served.uri]).arg(argument(target)?);
    run(&mut tool, source.size(), progress)
}

fn open(path: &Path) -> Result<Arc<dyn Store>> {
    store::host::open_file(path, Mode::Read).map_err(|error| image::Error::from(error).into())
}

/// A path that `qemu-img` takes for nothing else: not for an option, nor for a protocol.
fn argument(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::System(path.display().to_string(), error))
}

/// The source as `qemu-img` is to open it: this file, as this format, and nothing that a name could mean besides.
fn source_options(path: &Path) -> Result<String> {
    let path = argument(path)?;
    let not_text = || Error::Damaged { file: path.clone(), what: "its name is not UTF-8".to_owned() };
    let text = path.to_str().ok_or_else(not_text)?;
    Ok(format!("driver=qcow2,file.driver=file,file.filename={}", text.replace(',', ",,")))
}

/// The size of a qcow2 that stands alone, from its header (QEMU's docs/interop/qcow2).
fn size(path: &Path) -> Result<u64> {
    let store = open(path)?;
    let damaged = |what: &str| Err(Error::Damaged { file: path.to_owned(), what: what.to_owned() });
    let mut head = [0; 80];
    if store.read_at(&mut head, 0).is_err() {
        return damaged("the qcow2 header is cut short");
    }
    if !head.starts_with(b"QFI\xfb") {
        return damaged("it is no qcow2");
    }
    let number = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    let version = u32::from_be_bytes(head[4..8].try_into().expect("four bytes"));
    let names_others = |what| Err(Error::NamesOthers { file: path.to_owned(), what });
    if number(8) != 0 {
        return names_others("it stands on another image");
    }
    if version >= 3 && number(72) & EXTERNAL_DATA != 0 {
        return names_others("its data lie in another file");
    }
    match number(24) {
        0 => damaged("a disk of no bytes"),
        size if size > MAX_SIZE => damaged(&format!("a disk of {size} bytes is too large")),
        size => Ok(size.next_multiple_of(512)),
    }
}

/// A disk that is served to one tool, on a socket in a folder of its own.
struct Served {
    export: Option<Export>,
    folder: PathBuf,
    uri: String,
}

impl Served {
    fn begin(chain: &Arc<Chain>, read_only: bool) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("tenby-{}", uuid::Uuid::new_v4().simple()));
        let failed = |error| Error::System(folder.display().to_string(), error);
        DirBuilder::new().mode(0o700).create(&folder).map_err(failed)?;
        let socket = folder.join("disk");
        let uri = crate::uri(&socket);
        let mut served = Self { export: None, folder, uri };
        let listener: Listener = listen_unix(&socket)?.into();
        let options = Options { read_only, ..Options::default() };
        served.export = Some(Export::serve(Arc::clone(chain), listener, options)?);
        Ok(served)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(export) = self.export.take() {
            export.stop();
        }
        // An empty folder that stays in the temporary place does no harm.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Runs the tool to its end. Says `false` if `progress` stopped it.
fn run(tool: &mut Command, total: u64, progress: Progress<'_>) -> Result<bool> {
    let spawned = tool.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::NotInstalled,
        _ => Error::System("qemu-img cannot be started".to_owned(), error),
    })?;
    let percent = Arc::new(AtomicU64::new(0));
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let told = Arc::clone(&percent);
    let reading = thread::spawn(move || read_percent(out, &told));
    let saying = thread::spawn(move || {
        let mut said = String::new();
        // What is cut off or no text says no more than the rest.
        let _ = err.map(|err| err.take(WORDS).read_to_string(&mut said));
        said
    });
    let ended = wait(&mut child, || progress(total / 10_000 * percent.load(Ordering::Relaxed), total));
    let (_, said) = (reading.join(), saying.join().unwrap_or_default());
    match ended.map_err(|error| Error::System("qemu-img".to_owned(), error))? {
        None => Ok(false),
        Some(status) if status.success() => Ok(true),
        Some(_) => {
            let said = said.lines().next().unwrap_or("it failed and said nothing").trim_start_matches("qemu-img: ");
            Err(Error::Tool(said.to_owned()))
        }
    }
}

/// Waits for the tool; `None` if `go_on` said to stop, and then it is gone.
fn wait(child: &mut Child, mut go_on: impl FnMut() -> bool) -> io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if !go_on() {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(PATIENCE);
    }
}

/// Takes `    (12.34/100%)` off the tool's output, in hundredths of a percent.
fn read_percent(out: Option<impl Read>, percent: &AtomicU64) {
    let Some(mut out) = out else { return };
    let mut bytes = [0; 256];
    while let Ok(count @ 1..) = out.read(&mut bytes) {
        let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
        let number = text.rsplit('(').next().and_then(|rest| rest.split('/').next());
        if let Some(now) = number.and_then(|number| number.trim().parse::<f64>().ok()) {
            percent.store((now * 100.0) as u64, Ordering::Relaxed);
        }
    }
}
