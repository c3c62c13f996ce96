//! `tenby vm`

use super::clone::{self, Origin};
use super::{Waiting, job, later, words};
use crate::out::{ask, interactive};
use crate::session::{Reader, Session, cancelled, problem};
use crate::work::interruptible;
use crate::{draw, follow, json};
use clap::{Args, Subcommand, ValueEnum};
use machine::request::{Create, Problem, Request, Settings, View};
use machine::root::Found;
use machine::tree::{Accel, Boot, DiskId, Firmware, NetMode, OnHostStop, Publish};
use std::path::PathBuf;
use std::time::Duration;

/// What can be done with machines.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Make a machine
    #[command(after_help = "Examples:
  tenby vm create web --disk new:20G --cdrom debian.iso --boot cdrom
  tenby vm create new --firmware uefi --disk new:20G --cdrom debian.iso --boot cdrom
  tenby vm create old --memory 2G --disk /srv/old.raw,format=raw --publish 8080:80
  tenby vm create big --disk /srv/big.vhdx,in-place
  tenby vm create test --from web@fresh --count 3 --start")]
    Create(Box<CreateArgs>),
    /// List the machines
    #[command(after_help = "Example:\n  tenby vm list --json")]
    List,
    /// Show a machine
    #[command(after_help = "Example:\n  tenby vm show web")]
    Show(Name),
    /// Change a machine's settings; what cannot change in its state is refused
    #[command(
        after_help = "Examples:\n  tenby vm set web --memory 4G --cpus 2\n  tenby vm set web --grow-disk disk0=40G"
    )]
    Set(Box<SetArgs>),
    /// Rename a machine
    #[command(after_help = "Example:\n  tenby vm rename web shop")]
    Rename {
        #[command(flatten)]
        vm: Name,
        /// The new name
        #[arg(value_parser = words::new_name)]
        new: String,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Delete a machine and its folder
    #[command(after_help = "Examples:\n  tenby vm delete web --dry-run\n  tenby vm delete web --yes")]
    Delete(DeleteArgs),
    /// Start a machine, or resume a saved one
    #[command(after_help = "Example:\n  tenby vm start web")]
    Start {
        #[command(flatten)]
        vm: Name,
        /// Leave it standing at its first instruction, or where it was saved
        #[arg(long)]
        paused: bool,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Write a machine's memory out and end it; start resumes it
    #[command(after_help = "Example:\n  tenby vm save web")]
    Save(Plain),
    /// Halt a machine's processors
    #[command(after_help = "Example:\n  tenby vm pause web")]
    Pause(Plain),
    /// Let a paused machine go on
    #[command(after_help = "Example:\n  tenby vm resume web")]
    Resume(Plain),
    /// Reset a machine
    #[command(after_help = "Example:\n  tenby vm restart web")]
    Restart(Plain),
    /// Ask the guest to shut down, and wait for it
    #[command(after_help = "Examples:\n  tenby vm stop web\n  tenby vm stop web --turn-off")]
    Stop {
        #[command(flatten)]
        vm: Name,
        /// How long to wait for the guest
        #[arg(long, default_value = "60s", value_parser = words::duration, value_name = "TIME")]
        timeout: Duration,
        /// Turn it off at once, as if by its power switch; a saved machine's memory is dropped
        #[arg(long)]
        turn_off: bool,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// The serial console (Ctrl-] leaves)
    #[command(after_help = "Examples:\n  tenby vm console web\n  echo uptime | tenby vm console web")]
    Console(Name),
    /// A picture of the screen
    #[command(after_help = "Example:\n  tenby vm screenshot web web.png")]
    Screenshot {
        #[command(flatten)]
        vm: Name,
        /// The picture's file
        #[arg(value_name = "FILE.png")]
        file: PathBuf,
    },
    /// What was done to a machine, by which request, when, how it ended
    #[command(after_help = "Example:\n  tenby vm log web")]
    Log(Name),
    /// The rows of a machine's ledger, as JSON
    #[command(after_help = "Example:\n  tenby vm ledger web")]
    Ledger(Name),
    /// Check a machine's files: that all are there, open, stand on each other and are sound
    #[command(after_help = "Examples:\n  tenby vm check web\n  tenby vm check web --deep")]
    Check {
        #[command(flatten)]
        vm: Name,
        /// Read all that snapshots hold, and compare it with the hashes that were recorded when it was sealed
        #[arg(long)]
        deep: bool,
    },
    /// Take back what was deleted or discarded, as long as `vm set --undo-for` keeps it
    #[command(
        after_help = "Examples:\n  tenby vm set web --undo-for 1h\n  tenby vm undo web\n  tenby vm undo web Monday"
    )]
    Undo {
        #[command(flatten)]
        vm: Name,
        /// What to take back: an id (`snapshot list` has them), or the name of a snapshot that was deleted [default: the latest]
        id: Option<String>,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Copy what a machine shares with others: those that were made from its snapshots, or the one that it was made from
    #[command(after_help = "Example:\n  tenby vm detach web")]
    Detach(Plain),
    /// Rebuild a machine from its folder's files, when its ledger is lost or damaged; says what could not be known
    #[command(after_help = "Examples:
  tenby vm rescue /var/lib/tenby/0199f2f5b7c34e1f9a4a9d1c8e6b7a50
  tenby vm rescue /var/lib/tenby/0199f2f5b7c34e1f9a4a9d1c8e6b7a50 --with /srv/big.vhdx")]
    Rescue {
        /// The machine's folder
        folder: PathBuf,
        /// A file of yours that the machine used where it lies: a disk taken in place, or an image in its CD drive
        #[arg(long = "with", value_name = "FILE")]
        named: Vec<PathBuf>,
    },
    /// Take in a machine that was exported, here or by Hyper-V (not there yet)
    #[command(after_help = "Example:\n  tenby vm import /srv/exports/web")]
    Import {
        /// The folder
        folder: PathBuf,
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Copy a machine, or one of its snapshots, into a folder (not there yet)
    #[command(after_help = "Example:\n  tenby vm export web --to /srv/exports/web")]
    Export {
        #[command(flatten)]
        vm: Name,
        /// The snapshot
        snapshot: Option<String>,
        /// The folder
        #[arg(long)]
        to: PathBuf,
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
}

/// A machine that is there.
#[derive(Debug, Args)]
pub(crate) struct Name {
    /// The machine: its name, its id, or how its id begins
    #[arg(value_name = "NAME", value_parser = words::name)]
    name: String,
}

/// A verb without options.
#[derive(Debug, Args)]
pub(crate) struct Plain {
    #[command(flatten)]
    vm: Name,
    #[command(flatten)]
    waiting: Waiting,
}

/// `vm create`
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Its name: 1 to 100 characters, no /, @ or leading -
    #[arg(value_parser = words::new_name)]
    name: String,
    /// RAM
    #[arg(long, default_value = "1G", value_parser = words::some_size, value_name = "SIZE")]
    memory: u64,
    /// Processors
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=255), value_name = "N")]
    cpus: u32,
    /// A disk: new:SIZE[,format=vhdx|vhd], FILE[,format=F][,parents=FOLDER] (copied in, with what it stands on), or FILE,in-place; each
    /// also [,bus=virtio|sata|ide|scsi]
    #[arg(long = "disk", value_parser = words::disk, value_name = "SPEC")]
    disks: Vec<words::DiskArg>,
    /// An image for the CD drive
    #[arg(long, value_name = "FILE.iso")]
    cdrom: Option<PathBuf>,
    /// What it boots from
    #[arg(long, value_enum, default_value = "disk")]
    boot: BootArg,
    /// A kernel to boot directly (copied in)
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk (copied in)
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "STRING", default_value = "", hide_default_value = true, requires = "kernel")]
    append: String,
    /// The firmware, for the machine's life
    #[arg(long, value_enum, default_value = "bios")]
    firmware: FirmwareArg,
    /// The network
    #[arg(long, value_enum, default_value = "user")]
    net: NetArg,
    /// A host port that leads into the guest; on 127.0.0.1 unless said
    #[arg(long, value_parser = words::publish, value_name = "[ADDR:]HOSTPORT:GUESTPORT")]
    publish: Vec<Publish>,
    /// How its processor runs
    #[arg(long, value_enum, default_value = "auto")]
    accel: AccelArg,
    /// Words of yours
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    note: String,
    /// Make it from a snapshot of another machine, with whose memory it goes on, if there is any. The files are shared until one of the two
    /// machines has no use for them any more; `vm detach` copies them
    #[arg(long, value_name = "VM@SNAP", conflicts_with_all = ["memory", "cpus", "disks", "cdrom", "boot", "kernel", "initrd", "append",
        "firmware", "net", "publish", "accel"])]
    from: Option<Origin>,
    /// Make so many: NAME-1 to NAME-N
    #[arg(long, value_name = "N", requires = "from", value_parser = clap::value_parser!(u32).range(1..=i64::from(clone::MOST)))]
    count: Option<u32>,
    /// Start it at once
    #[arg(long, requires = "from")]
    start: bool,
}

/// `vm set`
#[derive(Debug, Args)]
pub(crate) struct SetArgs {
    #[command(flatten)]
    vm: Name,
    /// RAM
    #[arg(long, value_parser = words::some_size, value_name = "SIZE")]
    memory: Option<u64>,
    /// Processors
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=255), value_name = "N")]
    cpus: Option<u32>,
    /// Words of yours
    #[arg(long, value_name = "TEXT")]
    note: Option<String>,
    /// Add a disk; see `tenby vm create --help`
    #[arg(long, value_parser = words::disk, value_name = "SPEC")]
    add_disk: Vec<words::DiskArg>,
    /// Remove a disk
    #[arg(long, value_parser = words::disk_id, value_name = "ID")]
    remove_disk: Vec<DiskId>,
    /// Grow a disk
    #[arg(long, value_parser = words::grow, value_name = "ID=SIZE")]
    grow_disk: Vec<(DiskId, u64)>,
    /// An image for the CD drive, or `none`
    #[arg(long, value_name = "FILE|none")]
    cdrom: Option<PathBuf>,
    /// What it boots from
    #[arg(long, value_enum)]
    boot: Option<BootArg>,
    /// The host ports that lead into the guest: these, and no others; `none` for none
    #[arg(long, value_parser = publish_or_none, value_name = "[ADDR:]HOSTPORT:GUESTPORT")]
    publish: Vec<PublishArg>,
    /// How long what is deleted or discarded can be taken back: 30m, 1h, 7d; 0: not at all. Counts for what is kept already, too
    #[arg(long, value_parser = words::undo_time, value_name = "TIME")]
    undo_for: Option<u64>,
    /// Start it with the host
    #[arg(long, value_parser = words::on_off, value_name = "on|off")]
    autostart: Option<bool>,
    /// What happens to it when the host stops
    #[arg(long, value_enum)]
    on_host_stop: Option<HostStopArg>,
    #[command(flatten)]
    waiting: Waiting,
}

/// A published port, or the word that there is none.
#[derive(Debug, Clone)]
struct PublishArg(Option<Publish>);

fn publish_or_none(text: &str) -> Result<PublishArg, String> {
    if text == "none" { Ok(PublishArg(None)) } else { words::publish(text).map(|port| PublishArg(Some(port))) }
}

/// `vm delete`
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    #[command(flatten)]
    vm: Name,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
    /// Leave a disk that was taken in place as it was, instead of merging what Now holds into it
    #[arg(long)]
    discard: bool,
    #[command(flatten)]
    waiting: Waiting,
}

/// What a machine boots from.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum BootArg {
    /// The first disk
    Disk,
    /// The CD drive
    Cdrom,
    /// The network
    Net,
}

impl From<BootArg> for Boot {
    fn from(boot: BootArg) -> Self {
        match boot {
            BootArg::Disk => Self::Disk,
            BootArg::Cdrom => Self::Cdrom,
            BootArg::Net => Self::Net,
        }
    }
}

/// A machine's firmware.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum FirmwareArg {
    /// A BIOS
    Bios,
    /// UEFI; its boot entries and other variables are part of each snapshot
    Uefi,
}

/// A machine's network.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum NetArg {
    /// Outward connections, and published ports
    User,
    /// No network card
    None,
}

/// How a guest's processor runs.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum AccelArg {
    /// KVM where the processor really offers it, else software
    Auto,
    /// The processor's own virtualisation
    Kvm,
    /// Software
    Tcg,
}

/// What happens to a machine when its host stops.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum HostStopArg {
    /// Its memory is saved
    Save,
    /// It is asked to shut down
    Stop,
    /// It is turned off
    Off,
}

impl From<HostStopArg> for OnHostStop {
    fn from(what: HostStopArg) -> Self {
        match what {
            HostStopArg::Save => Self::Save,
            HostStopArg::Stop => Self::Stop,
            HostStopArg::Off => Self::Off,
        }
    }
}

impl Verb {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Problem> {
        match self {
            Self::Create(args) => create(session, *args).await,
            Self::List => list(session).await,
            Self::Show(vm) => {
                let view = session.sure_reader(&session.find(&vm.name)?).await?.view().await?;
                session.out.show(&view, |look| draw::machine(&view, look));
                Ok(())
            }
            Self::Set(args) => set(session, *args).await,
            Self::Rename { vm, new, waiting } => carry_out(session, &vm, Request::Rename { name: new }, waiting).await,
            Self::Delete(args) => delete(session, args).await,
            Self::Start { vm, paused, waiting } => carry_out(session, &vm, Request::Start { paused }, waiting).await,
            Self::Save(verb) => carry_out(session, &verb.vm, Request::Save, verb.waiting).await,
            Self::Pause(verb) => carry_out(session, &verb.vm, Request::Pause, verb.waiting).await,
            Self::Resume(verb) => carry_out(session, &verb.vm, Request::Resume, verb.waiting).await,
            Self::Restart(verb) => carry_out(session, &verb.vm, Request::Restart, verb.waiting).await,
            Self::Stop { vm, timeout, turn_off, waiting } => {
                let request = Request::Stop { timeout_ms: timeout.as_millis() as u64, turn_off };
                carry_out(session, &vm, request, waiting).await
            }
            Self::Console(vm) => crate::console::run(session, &session.find(&vm.name)?).await,
            Self::Screenshot { vm, file } => screenshot(session, &vm, &file).await,
            Self::Log(vm) => log(session, &vm).await,
            Self::Ledger(vm) => {
                let ledger = session.reader(&session.find(&vm.name)?).await?.ledger().await?;
                session.out.document(&ledger);
                Ok(())
            }
            Self::Check { vm, deep } => crate::audit::run(session, &session.find(&vm.name)?, deep).await,
            Self::Undo { vm, id, waiting } => carry_out(session, &vm, Request::Undo { id }, waiting).await,
            Self::Detach(verb) => carry_out(session, &verb.vm, Request::Detach, verb.waiting).await,
            Self::Rescue { folder, named } => crate::rescue::run(session, folder, &named).await,
            Self::Import { .. } => Err(later("`tenby vm import`")),
            Self::Export { .. } => Err(later("`tenby vm export`")),
        }
    }
}

/// Asks for something and tells how it ended.
pub(crate) async fn carry_out(session: &Session, vm: &Name, request: Request, waiting: Waiting) -> Result<(), Problem> {
    let found = session.find(&vm.name)?;
    carry_out_on(session, &found, request, waiting).await
}

/// The same, for a machine that was found.
pub(crate) async fn carry_out_on(
    session: &Session,
    found: &Found,
    request: Request,
    waiting: Waiting,
) -> Result<(), Problem> {
    if waiting.at_once {
        let job = follow::submit(session, found, request).await?;
        session.out.show(&json::Asked { job: job.id }, |_| format!("{}\n", job.id));
        return Ok(());
    }
    let job = follow::ask(session, found, request).await?;
    job::told(session, &job)
}

async fn create(session: &Session, args: CreateArgs) -> Result<(), Problem> {
    if let Some(origin) = &args.from {
        let new = clone::New { name: args.name, count: args.count, start: args.start, note: args.note };
        return clone::create(session, origin, new).await;
    }
    let path = |path: &Option<PathBuf>| path.as_deref().map(words::existing_file).transpose();
    let spec = Create {
        name: args.name,
        memory: args.memory,
        cpus: args.cpus,
        disks: args.disks.iter().map(words::DiskArg::spec).collect::<Result<_, _>>()?,
        cdrom: path(&args.cdrom)?,
        boot: args.boot.into(),
        firmware: match args.firmware {
            FirmwareArg::Bios => Firmware::Bios,
            FirmwareArg::Uefi => Firmware::Uefi,
        },
        kernel: path(&args.kernel)?,
        initrd: path(&args.initrd)?,
        append: args.append,
        net: match args.net {
            NetArg::User => NetMode::User,
            NetArg::None => NetMode::None,
        },
        publish: args.publish,
        accel: match args.accel {
            AccelArg::Auto => Accel::Auto,
            AccelArg::Kvm => Accel::Kvm,
            AccelArg::Tcg => Accel::Tcg,
        },
        note: args.note,
    };
    let (root, name) = (session.root.clone(), spec.name.clone());
    let making = format!("making {name}");
    let id = interruptible(&session.out, making, move |progress| root.create(&spec, progress)).await?;
    if session.out.json() {
        let view = session.reader(&Found { id, name }).await?.view().await?;
        session.out.document(&view);
    } else {
        session.out.done(&format!("{name} is made; `tenby vm start {}` starts it", quoted(&name)));
    }
    Ok(())
}

/// A name as a shell takes it.
pub(crate) fn quoted(name: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_.:+,%".contains(c);
    if !name.is_empty() && name.chars().all(plain) {
        name.to_owned()
    } else {
        format!("'{}'", name.replace('\'', r"'\''"))
    }
}

/// A word as a person would type it.
pub(crate) fn quoted_loosely(word: &str) -> String {
    if word.contains([' ', '"', '\'', '$', '\\']) || word.is_empty() { quoted(word) } else { word.to_owned() }
}

async fn list(session: &Session) -> Result<(), Problem> {
    let vms: Vec<View> = session.every(Reader::view).await?.into_iter().map(|(_, view)| view).collect();
    session.out.show(&json::Machines { vms: &vms }, |look| draw::machines(&vms, look));
    Ok(())
}

async fn set(session: &Session, args: SetArgs) -> Result<(), Problem> {
    let publish = match args.publish.as_slice() {
        [] => None,
        ports => Some(ports.iter().filter_map(|port| port.0.clone()).collect()),
    };
    let cdrom = match args.cdrom.as_deref() {
        Some(path) if path.as_os_str() == "none" => Some(String::new()),
        Some(path) => Some(words::existing_file(path)?),
        None => None,
    };
    let settings = Settings {
        memory: args.memory,
        cpus: args.cpus,
        note: args.note,
        add_disks: args.add_disk.iter().map(words::DiskArg::spec).collect::<Result<_, _>>()?,
        remove_disks: args.remove_disk,
        grow_disks: args.grow_disk,
        cdrom,
        boot: args.boot.map(Into::into),
        publish,
        autostart: args.autostart,
        on_host_stop: args.on_host_stop.map(Into::into),
        undo_for: args.undo_for,
    };
    if settings == Settings::default() {
        return Err(Problem::usage("nothing to change was named").hint("tenby vm set --help"));
    }
    carry_out(session, &args.vm, Request::Set(Box::new(settings)), args.waiting).await
}

async fn delete(session: &Session, args: DeleteArgs) -> Result<(), Problem> {
    let found = session.find(&args.vm.name)?;
    if args.dry_run {
        let reader = session.reader(&found).await?;
        let (view, tree) = (reader.view().await?, reader.tree().await?);
        session
            .out
            .show(&Deletion::of(session, &view, &tree), |_| told(&Deletion::of(session, &view, &tree), &view.name));
        return Ok(());
    }
    if !args.yes && interactive() {
        let question = format!("Delete {} with its disks and snapshots? It cannot be taken back. [y/N] ", found.name);
        if !ask(&question).is_some_and(|answer| ["y", "yes"].contains(&answer.to_lowercase().as_str())) {
            return Err(cancelled(format!("{} stays", found.name)));
        }
    }
    let deleted = carry_out_on(session, &found, Request::DeleteMachine { discard: args.discard }, args.waiting).await;
    session.root.clear_away(found.id);
    deleted
}

/// What `vm delete --dry-run` says.
#[derive(Debug, serde::Serialize)]
struct Deletion {
    folder: PathBuf,
    snapshots: usize,
    bytes: u64,
    /// Of which so many stay: other machines have them, too.
    shared: u64,
}

impl Deletion {
    fn of(session: &Session, view: &View, tree: &machine::request::TreeView) -> Self {
        let held: u64 = tree.snapshots.iter().map(|snapshot| snapshot.disk_bytes + snapshot.memory_bytes).sum();
        Self {
            folder: session.root.machine_folder(view.id),
            snapshots: tree.snapshots.len(),
            bytes: held + tree.now.disk_bytes,
            shared: view.shared,
        }
    }
}

fn told(deletion: &Deletion, name: &str) -> String {
    let snapshots = draw::count(deletion.snapshots, "snapshot");
    let shared = match deletion.shared {
        0 => String::new(),
        bytes => format!("; {} of its files stay, for other machines have them, too", draw::size(bytes)),
    };
    let folder = deletion.folder.display();
    format!("{name} would go: {folder} with {snapshots}, {}{shared}\n", draw::size(deletion.bytes))
}

async fn screenshot(session: &Session, vm: &Name, file: &std::path::Path) -> Result<(), Problem> {
    let found = session.find(&vm.name)?;
    let picture = session.worker(&found).await?.screenshot(found.id).await.map_err(problem)?;
    std::fs::write(file, &picture).map_err(|error| Problem::failed(format!("{}: {error}", file.display())))?;
    session.out.done(&format!("{}: {}", file.display(), draw::size(picture.len() as u64)));
    Ok(())
}

async fn log(session: &Session, vm: &Name) -> Result<(), Problem> {
    let lines = session.reader(&session.find(&vm.name)?).await?.log().await?;
    session.out.show(&json::Log { log: &lines }, |look| {
        let mut text = String::new();
        for line in &lines {
            let job = line.job.map_or_else(|| " ".repeat(8), draw::short);
            text.extend([
                look.date(line.at),
                "  ".to_owned(),
                job,
                "  ".to_owned(),
                draw::plain(&line.what),
                "\n".to_owned(),
            ]);
        }
        text
    });
    Ok(())
}
