//! qcow2, which is QEMU's own format: `qemu-img` reads and writes it, from and to a disk that we serve.

use super::problem::{data_bytes, no_room, problem};
use super::work::interruptible;
use super::{Info, Place, Target, begin, blank, cancelled, edit, finish, refused};
use crate::out::Out;
use export::{Export, Listener, Options, listen_unix};
use image::{Access, Chain};
use machine::request::Problem;
use serde::Serialize;
use std::fs::DirBuilder;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use store::Mode;

/// How often the copy is asked how far it is.
const PATIENCE: Duration = Duration::from_millis(50);
/// How much of what the tool says about a failure is kept, bytes.
const WORDS: u64 = 4096;
/// An incompatible feature of a qcow2: its data lie in another file.
const EXTERNAL_DATA: u64 = 1 << 2;

/// A qcow2 that was made.
#[derive(Debug, Serialize)]
pub(crate) struct Made {
    file: PathBuf,
    format: &'static str,
    size: u64,
    bytes: u64,
}

/// Whether a file says that it is a qcow2.
pub(crate) fn is_qcow2(path: &Path) -> Result<bool, Problem> {
    let store = store::host::open_file(path, Mode::Read).map_err(|error| problem(&error.into()))?;
    let signature = image::open::probe(&*store).map_err(|error| problem(&error))?;
    Ok(signature == Some(image::open::Signature::Foreign("qcow2")))
}

/// Copies a qcow2 into a new image. Nothing is left if it fails or is cancelled.
pub(crate) async fn convert_from(source: &Path, target: Target<'_>, out: &Out) -> Result<Info, Problem> {
    let size = qcow2_size(source)?;
    let new = begin(target.path, target.durable)?;
    let store = new.store();
    let fitted = target.size(size, out)?;
    let Target { format, kind, dense, .. } = target;
    let (from, file) = (source_options(source)?, target.path.to_owned());
    let source_bytes = std::fs::metadata(source).map_or(0, |data| data.len());
    let complete = interruptible(out, format!("copying {}", source.display()), move |progress| {
        let chain = Arc::new(blank(&store, format, kind, fitted, 512).map_err(|error| problem(&error))?);
        let served = Served::begin(&chain, false)?;
        let mut tool = Command::new("qemu-img");
        tool.args(["convert", "-p", "-n", "--target-is-zero", "--image-opts", "-O", "raw", &from, &served.uri]);
        let complete = run(&mut tool, size, progress).map_err(|error| match is_no_room(&error) {
            // What the source takes is what the copy will, roughly.
            true => no_room(source_bytes, &*store, &file),
            false => error,
        })?;
        drop(served);
        chain.close().map_err(|error| problem(&error))?;
        let filled =
            complete && (!dense || image::convert::fill(&*store, progress).map_err(|error| problem(&error))?);
        Ok(filled)
    })
    .await?;
    if !complete {
        return Err(target.cancelled());
    }
    finish(new, target.path)?;
    target.info()
}

/// Copies an image into a new qcow2. Nothing is left if it fails or is cancelled.
pub(crate) async fn convert_to(
    source: Place,
    target: &Path,
    dense: bool,
    durable: bool,
    out: &Out,
) -> Result<Made, Problem> {
    edit::check_still(&source.path, out).await?;
    let new = begin(target, durable)?;
    let (store, partial, file) = (new.store(), new.path(), target.to_owned());
    let what = format!("copying {}", source.path.display());
    let copied = interruptible(out, what, move |progress| {
        let chain = Arc::new(source.chain(Access::Read)?);
        let size = chain.size();
        let served = Served::begin(&chain, true)?;
        let mut tool = Command::new("qemu-img");
        tool.args(["convert", "-p", "-f", "raw", "-O", "qcow2", &served.uri]).arg(partial_argument(&partial)?);
        let complete = run(&mut tool, size, progress).map_err(|error| match data_bytes(&chain) {
            Ok(need) if is_no_room(&error) => no_room(need, &*store, &file),
            _ => error,
        })?;
        drop(served);
        let filled =
            complete && (!dense || image::convert::fill(&*store, progress).map_err(|error| problem(&error))?);
        store.sync().map_err(|error| problem(&error.into()))?;
        Ok(filled.then_some((size, store.allocated().map_err(|error| problem(&error.into()))?)))
    })
    .await?;
    let Some((size, bytes)) = copied else {
        return Err(cancelled(format!("the copy was cancelled; {} was not made", target.display())));
    };
    finish(new, target)?;
    Ok(Made { file: target.to_owned(), format: "qcow2", size, bytes })
}

/// A path that `qemu-img` takes for nothing else: not for an option, nor for a protocol.
fn partial_argument(path: &Path) -> Result<PathBuf, Problem> {
    std::path::absolute(path).map_err(|error| Problem::failed(format!("{}: {error}", path.display())))
}

/// The source as `qemu-img` is to open it: this file, as this format, and nothing that a name could mean besides.
fn source_options(path: &Path) -> Result<String, Problem> {
    let path = partial_argument(path)?;
    let text = path.to_str().ok_or_else(|| Problem::usage(format!("{}: not UTF-8", path.display())))?;
    Ok(format!("driver=qcow2,file.driver=file,file.filename={}", text.replace(',', ",,")))
}

/// The size of a qcow2 that stands alone, from its header (QEMU's docs/interop/qcow2). One that names other files is refused: no path
/// from an image is opened.
fn qcow2_size(path: &Path) -> Result<u64, Problem> {
    let store = store::host::open_file(path, Mode::Read).map_err(|error| problem(&error.into()))?;
    let damaged = |what: &str| Problem::damaged(format!("{}: {what}", path.display()));
    let mut head = [0; 80];
    store.read_at(&mut head, 0).map_err(|_| damaged("the qcow2 header is cut short"))?;
    let number = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    let version = u32::from_be_bytes(head[4..8].try_into().expect("four bytes"));
    if number(8) != 0 {
        return Err(damaged("it stands on another image, whose name in it is not followed"));
    }
    if version >= 3 && number(72) & EXTERNAL_DATA != 0 {
        return Err(damaged("its data lie in another file, whose name in it is not followed"));
    }
    match number(24) {
        0 => Err(damaged("a disk of no bytes")),
        size if size > 64 << 40 => Err(damaged(&format!("a disk of {size} bytes is too large"))),
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
    fn begin(chain: &Arc<Chain>, read_only: bool) -> Result<Self, Problem> {
        let folder = std::env::temp_dir().join(format!("tenby-{}", uuid::Uuid::new_v4().simple()));
        let failed = |error: std::io::Error| Problem::failed(format!("{}: {error}", folder.display()));
        DirBuilder::new().mode(0o700).create(&folder).map_err(failed)?;
        let socket = folder.join("disk");
        let uri = format!("nbd+unix:///?socket={}", super::escaped(&socket.display().to_string()));
        let mut served = Self { export: None, folder, uri };
        let listener: Listener = listen_unix(&socket).map_err(|error| refused(&error))?.into();
        let options = Options { read_only, ..Options::default() };
        served.export = Some(Export::serve(Arc::clone(chain), listener, options).map_err(|error| refused(&error))?);
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
fn run(tool: &mut Command, total: u64, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool, Problem> {
    let spawned = tool.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            Problem::failed("qcow2 is read and written with qemu-img, which is not installed")
                .hint("sudo apt install qemu-utils")
        }
        _ => Problem::failed(format!("qemu-img cannot be started: {error}")),
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
    match ended.map_err(|error| Problem::failed(format!("qemu-img: {error}")))? {
        None => Ok(false),
        Some(status) if status.success() => Ok(true),
        Some(_) => {
            let said = said.lines().next().unwrap_or("it failed and said nothing").trim_start_matches("qemu-img: ");
            Err(Problem::failed(format!("qemu-img: {said}")))
        }
    }
}

/// Whether it is for want of space that the tool failed, by its own words.
fn is_no_room(problem: &Problem) -> bool {
    problem.message.contains("No space left on device")
}

/// Waits for the tool; `None` if `go_on` said to stop, and then it is gone.
fn wait(child: &mut Child, mut go_on: impl FnMut() -> bool) -> std::io::Result<Option<std::process::ExitStatus>> {
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
