//! `tenby disk`: image files, without any machine.

use super::{later, words};
use crate::disk::{self, Parents, Place};
use crate::out::Out;
use clap::{Args, Subcommand, ValueEnum};
use image::{Format, Kind};
use machine::request::Problem;
use std::path::PathBuf;

/// What can be done with disk image files.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Make an empty image
    #[command(after_help = "Examples:
  tenby disk create data.vhdx --size 20G
  tenby disk create child.avhdx --parent data.vhdx
  tenby disk create child.avhdx --parent /srv/bases/data.vhdx --parents /srv/bases")]
    Create(CreateArgs),
    /// What a file is
    #[command(after_help = "Examples:
  tenby disk info data.vhdx --chain
  tenby disk info child.avhdx --chain --parents /srv/bases")]
    Info {
        /// The image file
        file: PathBuf,
        /// With all its parents, and which of the files something stands on
        #[arg(long)]
        chain: bool,
        #[command(flatten)]
        reading: Reading,
    },
    /// The sha256 of the virtual content, as of the raw disk
    #[command(after_help = "Example:\n  tenby disk hash data.vhdx")]
    Hash {
        /// The image file
        file: PathBuf,
        #[command(flatten)]
        reading: Reading,
    },
    /// Copy an image into another format
    #[command(after_help = "Examples:
  tenby disk convert old.raw new.vhdx
  tenby disk convert data.vhdx data.img --to raw
  tenby disk convert data.vhdx upload.vhd --azure")]
    Convert(ConvertArgs),
    /// Serve an image by NBD, one export with the empty name; prints its URI
    #[command(after_help = "Examples:
  tenby disk serve data.vhdx --socket /tmp/data.sock
  tenby disk serve data.vhdx --port 10809 --read-only")]
    Serve(ServeArgs),
    /// Check an image file: ends with 0 if it is sound, with 5 if it is damaged
    #[command(after_help = "Examples:
  tenby disk check data.vhdx
  tenby disk check data.vhdx --repair
  tenby disk check data.vhdx --undo data.vhdx.undo-20261126T101112345Z")]
    Check {
        /// The image file
        file: PathBuf,
        /// Mend what can be mended; what is written over is kept in a file beside it
        #[arg(long)]
        repair: bool,
        /// Take a repair back with the file that it kept
        #[arg(long, value_name = "UNDO-FILE", conflicts_with = "repair")]
        undo: Option<PathBuf>,
    },
    /// Where an image's content lies
    #[command(after_help = "Example:\n  tenby disk map data.vhdx --json")]
    Map {
        /// The image file
        file: PathBuf,
        #[command(flatten)]
        reading: Reading,
    },
    /// Compare the content of two images; ends with 1 if they differ
    #[command(after_help = "Example:\n  tenby disk compare a.vhdx b.raw")]
    Compare {
        /// One
        a: PathBuf,
        /// The other
        b: PathBuf,
        #[command(flatten)]
        reading: Reading,
    },
    /// Change an image's size
    #[command(after_help = "Example:\n  tenby disk resize data.vhdx 40G")]
    Resize {
        /// The image file
        file: PathBuf,
        /// The new size
        #[arg(value_parser = words::some_size)]
        size: u64,
        #[command(flatten)]
        reading: Reading,
    },
    /// Give unused space back
    #[command(after_help = "Example:\n  tenby disk compact data.vhdx")]
    Compact {
        /// The image file
        file: PathBuf,
        #[command(flatten)]
        reading: Reading,
    },
    /// Tell a child where its parent is
    #[command(after_help = "Example:\n  tenby disk reconnect child.avhdx data.vhdx")]
    Reconnect {
        /// The child
        child: PathBuf,
        /// Its parent
        parent: PathBuf,
        /// Even if the ids differ; the child remembers it
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        parents: ParentsArg,
    },
    /// Merge a child into its parent, or into a new file
    #[command(after_help = "Example:\n  tenby disk merge child.avhdx")]
    Merge {
        /// The child
        child: PathBuf,
        /// A new file, instead of the parent; the child stays then
        #[arg(long)]
        into: Option<PathBuf>,
        #[command(flatten)]
        parents: ParentsArg,
    },
}

/// Where parents are looked for.
#[derive(Debug, Args)]
pub(crate) struct ParentsArg {
    /// A folder to look for parents in, besides the one that the image lies in; may be repeated
    #[arg(long = "parents", value_name = "FOLDER")]
    folders: Vec<PathBuf>,
}

impl ParentsArg {
    fn open(&self) -> Result<Parents, Problem> {
        Parents::open(&self.folders)
    }
}

/// How images are read.
#[derive(Debug, Args)]
pub(crate) struct Reading {
    /// The format of a file without signature: raw
    #[arg(long, value_enum, value_name = "FORMAT")]
    from: Option<FormatArg>,
    #[command(flatten)]
    parents: ParentsArg,
}

impl Reading {
    fn place(&self, file: &std::path::Path) -> Result<Place, Problem> {
        let format = self.from.map(FormatArg::known).transpose()?;
        Place::of(file, format, self.parents.open()?)
    }
}

/// `disk create`
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The new file; its ending says its format
    file: PathBuf,
    /// The disk's size; a child has its parent's
    #[arg(long, value_parser = words::some_size, required_unless_present = "parent")]
    size: Option<u64>,
    /// How it holds its blocks [default: differencing with --parent, else dynamic]
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    kind: Option<KindArg>,
    /// The image that it stands on, in the same folder or in one that is named with --parents
    #[arg(long, value_name = "FILE")]
    parent: Option<PathBuf>,
    #[command(flatten)]
    parents: ParentsArg,
    /// Bytes in a block: 1M to 256M, a power of two
    #[arg(long, value_parser = words::some_size, value_name = "SIZE")]
    block_size: Option<u64>,
    /// Bytes in a logical sector: 512 or 4096
    #[arg(long, value_parser = words::some_size, value_name = "BYTES")]
    sector_size: Option<u64>,
}

/// `disk convert`
#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// The image to copy
    source: PathBuf,
    /// The new file; its ending says its format
    target: PathBuf,
    #[command(flatten)]
    reading: Reading,
    /// The new file's format
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Option<FormatArg>,
    /// How the new file holds its blocks
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    kind: Option<KindArg>,
    /// The new file has no holes: all of it takes space
    #[arg(long)]
    dense: bool,
    /// Do not wait until the new file would survive a power cut, as cp and qemu-img do not
    #[arg(long)]
    no_sync: bool,
    /// Fit for Azure: a fixed VHD, its size rounded up to a whole MiB (20 MiB at least)
    #[arg(long)]
    azure: bool,
}

/// `disk serve`
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The image file
    file: PathBuf,
    /// The unix socket to listen on; a stale one is replaced
    #[arg(long, value_name = "SOCKET", required_unless_present = "port", conflicts_with = "port")]
    socket: Option<PathBuf>,
    /// The TCP port to listen on, on 127.0.0.1; 0 for any
    #[arg(long)]
    port: Option<u16>,
    /// Changes are refused
    #[arg(long)]
    read_only: bool,
    #[command(flatten)]
    reading: Reading,
}

/// An image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// Bytes as they are
    Raw,
    /// Microsoft's VHDX
    Vhdx,
    /// Microsoft's VHD
    Vhd,
    /// QEMU's
    Qcow2,
}

impl FormatArg {
    fn known(self) -> Result<Format, Problem> {
        match self {
            Self::Raw => Ok(Format::Raw),
            Self::Vhdx => Ok(Format::Vhdx),
            Self::Vhd => Ok(Format::Vhd),
            Self::Qcow2 => Err(later("the format qcow2")),
        }
    }

    /// What a file's name says.
    fn of(file: &std::path::Path) -> Option<Self> {
        match file.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "raw" | "img" => Some(Self::Raw),
            "vhdx" | "avhdx" => Some(Self::Vhdx),
            "vhd" | "avhd" => Some(Self::Vhd),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }
}

/// How an image holds its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KindArg {
    /// Every block has its place
    Fixed,
    /// Blocks are placed when first written
    Dynamic,
    /// Blocks that were not written are the parent's
    Differencing,
}

impl From<KindArg> for Kind {
    fn from(kind: KindArg) -> Self {
        match kind {
            KindArg::Fixed => Self::Fixed,
            KindArg::Dynamic => Self::Dynamic,
            KindArg::Differencing => Self::Differencing,
        }
    }
}

impl Verb {
    pub(crate) async fn run(self, out: &Out) -> Result<(), Problem> {
        match self {
            Self::Create(args) => create(args, out),
            Self::Info { file, chain, reading } => {
                let place = reading.place(&file)?;
                let info = if chain { disk::chain(place, out).await? } else { disk::info(&place)? };
                out.show(&info, |look| info.draw(look));
                Ok(())
            }
            Self::Hash { file, reading } => {
                let place = reading.place(&file)?;
                let hash = disk::hash(place, out).await?;
                out.show(&hash, |_| format!("{}  {}\n", hash.sha256, file.display()));
                Ok(())
            }
            Self::Convert(args) => convert(args, out).await,
            Self::Serve(args) => {
                let place = args.reading.place(&args.file)?;
                let at = match (args.socket, args.port) {
                    (Some(socket), _) => disk::At::Socket(socket),
                    (None, port) => disk::At::Port(port.unwrap_or(0)),
                };
                disk::serve(&place, at, args.read_only, out).await
            }
            Self::Check { file, repair, undo } => check(&file, repair, undo.as_deref(), out).await,
            Self::Map { file, reading } => {
                let map = disk::map(reading.place(&file)?, out).await?;
                out.show(&map, |_| map.draw());
                Ok(())
            }
            Self::Compare { a, b, reading } => {
                let places = (reading.place(&a)?, reading.place(&b)?);
                compare(places, out).await
            }
            Self::Resize { file, size, reading } => {
                let info = disk::resize(reading.place(&file)?, size, out).await?;
                let done = format!("{} has {} now", file.display(), crate::draw::size(size));
                made(&info, &done, out);
                Ok(())
            }
            Self::Compact { file, reading } => {
                let compacted = disk::compact(reading.place(&file)?, out).await?;
                let (before, after) = (compacted.bytes_before, compacted.bytes);
                let (given, left) = (crate::draw::size(before.saturating_sub(after)), crate::draw::size(after));
                made(&compacted, &format!("{} given back; {} takes {left}", given, file.display()), out);
                Ok(())
            }
            Self::Reconnect { child, parent, force, parents } => {
                let parents = parents.open()?;
                let place = |file: &std::path::Path| Place::of(file, None, parents.clone());
                let reconnected = disk::reconnect(&place(&child)?, &place(&parent)?, force, out).await?;
                out.show(&reconnected, |look| reconnected.draw(look));
                Ok(())
            }
            Self::Merge { child, into, parents } => {
                merge(Place::of(&child, None, parents.open()?)?, &child, into.as_deref(), out).await
            }
        }
    }
}

/// Something was done: its document, or a line.
fn made(document: &impl serde::Serialize, line: &str, out: &Out) {
    if out.json() {
        out.document(document);
    }
    out.done(line);
}

async fn compare((one, other): (Place, Place), out: &Out) -> Result<(), Problem> {
    let comparison = disk::compare(one, other, out).await?;
    out.show(&comparison, |_| comparison.draw());
    if !comparison.equal {
        // That they differ is an answer, not a failure: all has been said.
        std::process::exit(1);
    }
    Ok(())
}

async fn merge(
    place: Place,
    child: &std::path::Path,
    into: Option<&std::path::Path>,
    out: &Out,
) -> Result<(), Problem> {
    let Some(target) = into else {
        let merged = disk::merge(place, out).await?;
        let line = format!("{} holds all now; {} is gone", merged.file.display(), merged.removed.display());
        made(&merged, &line, out);
        return Ok(());
    };
    let format = new_format(None, target)?;
    let target = disk::Target { path: target, format, kind: None, dense: false, durable: true, azure: false };
    let info = disk::convert(place, target, out).await?;
    made(&info, &format!("{} is made; {} is as it was", target.path.display(), child.display()), out);
    Ok(())
}

/// The format of a new file: as said, else as its ending says.
fn new_format(said: Option<FormatArg>, file: &std::path::Path) -> Result<Format, Problem> {
    let wrong = || {
        Problem::usage(format!("{}: its ending says no format", file.display()))
            .hint("end it in .vhdx, .avhdx, .vhd, .avhd, .raw or .img, or say --to")
    };
    said.or_else(|| FormatArg::of(file)).ok_or_else(wrong)?.known()
}

async fn check(file: &std::path::Path, repair: bool, undo: Option<&std::path::Path>, out: &Out) -> Result<(), Problem> {
    if let Some(undo) = undo {
        disk::check::take_back(file, undo, out).await?;
        out.done(&format!("{}: the repair is taken back", file.display()));
    }
    let checked = if repair { disk::check::repair(file, out).await? } else { disk::check::check(file, out).await? };
    out.show(&checked, |_| checked.draw());
    if !checked.clean() && undo.is_none() {
        // The document is the report, also with `--json`; what is left is a line for people, and the code.
        let problem = checked.problem();
        out.failure(&problem);
        std::process::exit(problem.kind.code().into());
    }
    Ok(())
}

fn create(args: CreateArgs, out: &Out) -> Result<(), Problem> {
    let kind = match (args.kind, &args.parent) {
        (Some(KindArg::Differencing), None) => {
            return Err(Problem::usage("a differencing image stands on another one").hint("--parent FILE"));
        }
        (Some(KindArg::Fixed | KindArg::Dynamic), Some(_)) => {
            return Err(Problem::usage("an image with a parent is a differencing one").hint("--type differencing"));
        }
        (_, Some(_)) => Kind::Differencing,
        (kind, None) => kind.map_or(Kind::Dynamic, Into::into),
    };
    let small = |what: &str, bytes: Option<u64>| {
        bytes
            .map(|bytes| u32::try_from(bytes).map_err(|_| Problem::usage(format!("the {what} is too large"))))
            .transpose()
    };
    let wanted = disk::New {
        format: new_format(None, &args.file)?,
        size: args.size,
        kind,
        parent: args.parent.map(|parent| Place::of(&parent, None, args.parents.open()?)).transpose()?,
        block_size: small("block size", args.block_size)?,
        sector_size: small("sector size", args.sector_size)?,
    };
    let info = disk::create(&args.file, &wanted, out)?;
    if out.json() {
        out.document(&info);
    }
    out.done(&format!("{} is made", args.file.display()));
    Ok(())
}

async fn convert(mut args: ConvertArgs, out: &Out) -> Result<(), Problem> {
    if args.azure {
        let format = args.to.or_else(|| FormatArg::of(&args.target)).unwrap_or(FormatArg::Vhd);
        if format != FormatArg::Vhd || !matches!(args.kind, None | Some(KindArg::Fixed)) {
            return Err(Problem::usage("Azure takes fixed VHDs only: end the new file's name in .vhd, without --type"));
        }
        (args.to, args.kind) = (Some(format), Some(KindArg::Fixed));
    }
    if args.kind == Some(KindArg::Differencing) {
        return Err(Problem::usage("a converted image stands on nothing: --type fixed or dynamic"));
    }
    let done = format!("{} is made", args.target.display());
    let to_qcow2 = args.to.or_else(|| FormatArg::of(&args.target)) == Some(FormatArg::Qcow2);
    let from_qcow2 = match args.reading.from {
        Some(said) => said == FormatArg::Qcow2,
        None => disk::is_qcow2(&args.source)?,
    };
    if to_qcow2 {
        if from_qcow2 {
            return Err(Problem::usage(format!("{} is a qcow2 image already", args.source.display())));
        }
        if args.kind == Some(KindArg::Fixed) {
            return Err(Problem::usage("a qcow2 image is dynamic; --dense fills the file"));
        }
        let source = args.reading.place(&args.source)?;
        let made_file = disk::convert_to(source, &args.target, args.dense, !args.no_sync, out).await?;
        made(&made_file, &done, out);
        return Ok(());
    }
    let target = disk::Target {
        path: &args.target,
        format: new_format(args.to, &args.target)?,
        kind: args.kind.map(Into::into),
        dense: args.dense,
        durable: !args.no_sync,
        azure: args.azure,
    };
    let info = if from_qcow2 {
        disk::convert_from(&args.source, target, out).await?
    } else {
        disk::convert(args.reading.place(&args.source)?, target, out).await?
    };
    made(&info, &done, out);
    Ok(())
}
