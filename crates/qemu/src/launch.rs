//! A QEMU command line as typed values.
//!
//! Whatever a guest can see is fixed here: machine type, CPU model, device ids and PCI addresses. A captured machine loads only
//! into a process that was launched with the same ones, so a change here must not move anything that exists.
//!
//! ```text
//!   PCI slot   01 VGA   02 network   03 rng   04 virtio-scsi   05 the agent's port   08..17 virtio-blk, in the disks' order   1f chip set, AHCI
//!   AHCI port  0..4 disks, in their order   5 CD drive
//!   pflash     0 UEFI's code, read only     1 its variables
//! ```

use crate::confine::{Rights, descriptor};
use crate::error::{Error, Result};
use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What QEMU itself makes, in the run folder: made by [`crate::prepare`].
pub(crate) const QEMU_FOLDER: &str = "qemu";
/// The worker's monitor, in the run folder.
pub const QMP_SOCKET: &str = "qemu/qmp.sock";
/// A second monitor, left free for people and for emergencies (a monitor serves one client at a time).
pub const SPARE_QMP_SOCKET: &str = "qemu/qmp-spare.sock";
/// The port of the guest's agent, in the run folder: see [`crate::Agent`].
pub(crate) const AGENT_SOCKET: &str = "qemu/agent.sock";
/// The pipe into the first serial port, in the run folder. What the port prints goes to [`Launch::console_log`].
pub const SERIAL_PIPE: &str = "serial.pipe";
/// The screen (RFB), in the run folder.
pub const VNC_SOCKET: &str = "qemu/vnc.sock";
/// The process id, in the run folder.
pub const PID_FILE: &str = "qemu.pid";

/// The id of the user-mode network.
pub(crate) const NETDEV: &str = "net0";

/// The node of UEFI's code.
const FIRMWARE_CODE: &str = "firmware-code";
/// The node of its variables.
const FIRMWARE: &str = "firmware";
/// The nodes that are no disks'.
const TAKEN: [&str; 3] = ["cdrom", FIRMWARE, FIRMWARE_CODE];

/// The name by which an agent finds its port.
const AGENT: &str = "org.qemu.guest_agent.0";

/// Where QEMU has the descriptors that it was given as sets.
const FDSET: &str = "/dev/fdset";
/// Where every process has the files that it has open.
const OPEN_FILES: &str = "/proc/self/fd";

const FIRST_DISK_SLOT: usize = 0x08;
const VIRTIO_DISKS: usize = 16;
const AHCI_DISKS: usize = 5;
const SCSI_DISKS: usize = 64;
const CDROM_PORT: usize = 5;
const MIB: u64 = 1 << 20;

/// How long QEMU holds a guest's request while the disk server is away. Shorter than the 30 s after which a guest gives up on a SATA or
/// SCSI disk: past it QEMU stops the guest (`werror=stop`), whose clock then stands, and the request is repeated when it is resumed.
pub const RECONNECT_DELAY: Duration = Duration::from_secs(20);

/// Everything that a QEMU process is started with. The process always comes up standing still: [`crate::Qemu::resume`] lets it run.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a word more or less on a command line")]
pub struct Launch {
    /// The program.
    pub binary: PathBuf,
    /// A pinned machine type, never an alias: `pc-q35-7.2`.
    pub machine_type: String,
    /// How the processor runs.
    pub accel: Accel,
    /// The CPU model: `Nehalem`, `host`, …
    pub cpu_model: String,
    /// Whether the board has an HPET.
    pub hpet: bool,
    /// Whether there is a port for an agent in the guest.
    pub agent: bool,
    /// RAM in bytes; a multiple of 1 MiB.
    pub memory: u64,
    /// Processors, 1 to 255.
    pub cpus: u32,
    /// The machine's name, as `ps` and a VNC client show it.
    pub name: String,
    /// The machine's SMBIOS UUID, in the usual text form.
    pub uuid: String,
    /// The generation id (a UUID), new for every start: it tells a guest that it was taken back.
    pub generation: Option<String>,
    /// The folder of the process's sockets; it is the process's working directory. Must exist and be [prepared](crate::prepare); one per
    /// process.
    pub run_dir: PathBuf,
    /// The file to which QEMU's own words are appended.
    pub log: PathBuf,
    /// The file to which the first serial port's output is appended. See [`crate::Console`].
    pub console_log: PathBuf,
    /// The disks, in the guest's order.
    pub disks: Vec<Disk>,
    /// An image for the CD drive; without one there is no drive.
    pub cdrom: Option<PathBuf>,
    /// UEFI; without it the machine has QEMU's own BIOS.
    pub uefi: Option<Uefi>,
    /// What is tried first.
    pub boot: Boot,
    /// A kernel to boot directly.
    pub kernel: Option<Kernel>,
    /// The network card, on a user-mode network. Ports are published with [`crate::Qemu::publish`].
    pub nic: Option<Nic>,
    /// Whether the machine's memory comes from a stream ([`crate::Qemu::restore`]).
    pub incoming: bool,
    /// Whether QEMU gives up system calls that it does not need (seccomp).
    pub sandbox: bool,
    /// What QEMU may do on the host. A user of its own is given the CD and the firmware open; kernel and initial RAM disk it opens again
    /// itself, so whoever has such a file open must be allowed to read it.
    pub rights: Rights,
    /// Whether ports below 1024 are to be published.
    pub low_ports: bool,
}

/// How a guest's processor runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The processor's own virtualisation.
    Kvm,
    /// Software.
    Tcg,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its id, node name and serial number: 1 to 20 of `a-z 0-9 -`, a letter first.
    pub id: String,
    /// How it is attached.
    pub bus: Bus,
    /// Where it is served.
    pub nbd: Nbd,
}

/// UEFI: flash memory in two units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uefi {
    /// The file of its code, which is only read. It must have the same size wherever memory captured with it is restored.
    pub code: PathBuf,
    /// Where its variables are served: what the flash memory holds, of just its size.
    pub variables: Nbd,
}

/// An NBD export on a unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nbd {
    /// The NBD server's socket. A relative one lies in the run folder.
    pub socket: PathBuf,
    /// The export's name on that server.
    pub export: String,
    /// How long requests are held while the server is away; whole seconds. See [`RECONNECT_DELAY`].
    pub reconnect_delay: Duration,
}

/// How a disk is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// virtio-blk; at most 16.
    Virtio,
    /// The chip set's AHCI controller; at most 5.
    Ahci,
    /// virtio-scsi; at most 64.
    Scsi,
}

/// What is tried first. A disk and a CD that come later are still tried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Boot {
    /// The first disk.
    #[default]
    Disk,
    /// The CD drive.
    Cdrom,
    /// The network.
    Net,
}

/// A kernel that is booted directly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The kernel image.
    pub image: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub append: String,
}

/// A network card (virtio-net).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Its address: `52:54:00:xx:xx:xx`.
    pub mac: String,
    /// Whether its network leads nowhere, neither out of the host nor to it. To the guest it is the same network.
    pub isolated: bool,
}

/// A TCP port of the host that leads into the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Publish {
    /// The host's address to listen on.
    pub address: Ipv4Addr,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

impl Launch {
    /// The arguments, without the program itself.
    ///
    /// # Errors
    /// [`Error::Launch`] for values out of their ranges.
    pub fn args(&self) -> Result<Vec<OsString>> {
        self.check()?;
        let mut line = Line::default();
        self.machine(&mut line);
        Self::monitors(&mut line);
        self.sets(&mut line);
        self.devices(&mut line);
        self.storage(&mut line);
        self.boot_options(&mut line);
        Ok(line.0)
    }

    fn check(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::Launch(why));
        if self.memory == 0 || !self.memory.is_multiple_of(MIB) {
            return refuse(format!("{} bytes of memory are not a whole number of MiB", self.memory));
        }
        if !(1..=255).contains(&self.cpus) {
            return refuse(format!("{} processors; 1 to 255 are possible", self.cpus));
        }
        // QEMU's working directory is the run folder: any other relative path would mean another file there.
        for path in [self.run_dir.as_path(), &self.console_log].into_iter().chain(self.files()) {
            if !path.is_absolute() {
                return refuse(format!("the path {} is not absolute", path.display()));
            }
        }
        if self.boot == Boot::Cdrom && self.cdrom.is_none() {
            return refuse("it boots from a CD, but there is no CD image".into());
        }
        if self.boot == Boot::Net && self.nic.is_none() {
            return refuse("it boots from the network, but there is no network card".into());
        }
        self.check_disks()
    }

    fn check_disks(&self) -> Result<()> {
        for disk in &self.disks {
            let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let good = disk.id.starts_with(|c: char| c.is_ascii_lowercase())
                && disk.id.chars().all(letters)
                && disk.id.len() <= 20;
            if !good || TAKEN.contains(&disk.id.as_str()) {
                return Err(Error::Launch(format!("{:?} is no id of a disk", disk.id)));
            }
            if self.disks.iter().filter(|other| other.id == disk.id).count() > 1 {
                return Err(Error::Launch(format!("two disks are called {}", disk.id)));
            }
        }
        for (bus, most) in [(Bus::Virtio, VIRTIO_DISKS), (Bus::Ahci, AHCI_DISKS), (Bus::Scsi, SCSI_DISKS)] {
            let count = self.disks.iter().filter(|disk| disk.bus == bus).count();
            if count > most {
                return Err(Error::Launch(format!("{count} disks at {bus:?}, which takes {most}")));
            }
        }
        Ok(())
    }

    /// The files that QEMU reads.
    pub(crate) fn files(&self) -> Vec<&Path> {
        let code = self.uefi.as_ref().map(|uefi| &uefi.code);
        let kernel = self.kernel.iter().flat_map(|kernel| std::iter::once(&kernel.image).chain(&kernel.initrd));
        code.into_iter().chain(&self.cdrom).chain(kernel).map(PathBuf::as_path).collect()
    }

    /// Where QEMU finds one of them: below `open` by the number of its descriptor, if it is given it open.
    fn found(&self, file: &Path, open: &str) -> PathBuf {
        let place = self.files().iter().position(|one| *one == file);
        match (self.rights, place) {
            (Rights::User(..), Some(place)) => Path::new(open).join(descriptor(place).to_string()),
            _ => file.to_owned(),
        }
    }

    /// What QEMU takes for a file itself comes as a set of descriptors that it has a way of its own to.
    fn sets(&self, line: &mut Line) {
        let sets = usize::from(self.uefi.is_some()) + usize::from(self.cdrom.is_some());
        for number in (0..sets).map(descriptor).filter(|_| matches!(self.rights, Rights::User(..))) {
            let number = number.to_string();
            line.option("-add-fd", Opts::new().with("fd", &number).with("set", &number));
        }
    }

    fn machine(&self, line: &mut Line) {
        let accel = match self.accel {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        };
        line.flag("-no-user-config").flag("-nodefaults");
        // A guest that powers off must not take the process, and a capture under way, with it.
        line.flag("-no-shutdown");
        // Nothing runs before the worker has seen the process and published its ports.
        line.flag("-S");
        if self.incoming {
            line.pair("-incoming", "defer");
        }
        line.option("-name", Opts::new().with("guest", &self.name));
        line.pair("-uuid", &self.uuid);
        let machine = Opts::of(&self.machine_type).with("dump-guest-core", "off").with("mem-merge", "off");
        let machine = if self.hpet { machine } else { machine.with("hpet", "off") };
        let flash = |machine: Opts| machine.with("pflash0", FIRMWARE_CODE).with("pflash1", FIRMWARE);
        line.option("-machine", if self.uefi.is_some() { flash(machine) } else { machine });
        line.pair("-accel", accel).pair("-cpu", &self.cpu_model);
        // RAM stays private and anonymous (no memory backend): the only kind whose write protection costs next to nothing.
        line.pair("-m", format!("{}M", self.memory / MIB)).pair("-smp", self.cpus.to_string());
        // A guest asleep (S3) would be a state that nothing else knows.
        line.pair("-global", "ICH9-LPC.disable_s3=1");
        line.pair("-rtc", "base=utc");
        // Who gives rights up does it itself: QEMU 7.2 insists on finding its way to the file from the top.
        if self.rights == Rights::Starter {
            line.pair("-pidfile", PID_FILE);
        }
        if self.sandbox {
            line.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        }
    }

    fn monitors(line: &mut Line) {
        for (id, path) in [("qmp", QMP_SOCKET), ("qmp-spare", SPARE_QMP_SOCKET)] {
            line.option("-chardev", listening(id, path));
            line.option("-mon", Opts::new().with("chardev", id).with("mode", "control"));
        }
        // Its standard input is the pipe, its standard output the console log. A file takes each byte at once and once; a socket that
        // is full makes QEMU log a byte, and log it again when it is sent.
        line.option("-chardev", Opts::of("stdio").with("id", "serial0").with("signal", "off"));
        line.option("-device", Opts::of("isa-serial").with("id", "ttyS0").with("chardev", "serial0"));
        line.pair("-display", "none").pair("-vnc", format!("unix:{VNC_SOCKET}"));
    }

    fn devices(&self, line: &mut Line) {
        line.option("-device", pci("VGA", "vga", 0x01));
        line.option("-object", Opts::of("rng-builtin").with("id", "rng0"));
        line.option("-device", pci("virtio-rng-pci", "rng", 0x03).with("rng", "rng0"));
        if let Some(generation) = &self.generation {
            line.option("-device", Opts::of("vmgenid").with("id", "generation").with("guid", generation));
        }
        if self.agent {
            line.option("-device", pci("virtio-serial-pci", "ports", 0x05).with("max_ports", "2"));
            line.option("-chardev", listening("agent", AGENT_SOCKET));
            let port = Opts::of("virtserialport").with("id", "agent0").with("bus", "ports.0").with("nr", "1");
            line.option("-device", port.with("chardev", "agent").with("name", AGENT));
        }
        if let Some(nic) = &self.nic {
            let network = Opts::of("user").with("id", NETDEV);
            line.option("-netdev", if nic.isolated { network.with("restrict", "on") } else { network });
            let card = pci("virtio-net-pci", "nic0", 0x02).with("netdev", NETDEV).with("mac", &nic.mac);
            // Its boot ROM is a RAM block, part of what is captured: only there for those who boot from it.
            let card = if self.boot == Boot::Net {
                card.with("bootindex", self.boot_index(Boot::Net))
            } else {
                card.with("romfile", "")
            };
            line.option("-device", card);
        }
    }

    fn storage(&self, line: &mut Line) {
        if let Some(uefi) = &self.uefi {
            line.option("-blockdev", file_node(FIRMWARE_CODE, &self.found(&uefi.code, FDSET)));
            line.option("-blockdev", uefi.variables.node(FIRMWARE));
        }
        if self.disks.iter().any(|disk| disk.bus == Bus::Scsi) {
            line.option("-device", pci("virtio-scsi-pci", "scsi0", 0x04));
        }
        let (mut virtio, mut ahci, mut scsi) = (0, 0, 0);
        for (position, disk) in self.disks.iter().enumerate() {
            line.option("-blockdev", disk.nbd.node(&disk.id));
            let id = format!("dev-{}", disk.id);
            let device = match disk.bus {
                Bus::Virtio => pci("virtio-blk-pci", &id, FIRST_DISK_SLOT + count(&mut virtio)),
                Bus::Ahci => Opts::of("ide-hd").with("id", &id).with("bus", format!("ide.{}", count(&mut ahci))),
                Bus::Scsi => Opts::of("scsi-hd")
                    .with("id", &id)
                    .with("bus", "scsi0.0")
                    .with("scsi-id", count(&mut scsi).to_string()),
            };
            let mut device = device.with("drive", &disk.id).with("serial", &disk.id);
            // An outage must stop the guest, not damage its file systems.
            device = device.with("werror", "stop").with("rerror", "stop");
            if position == 0 {
                device = device.with("bootindex", self.boot_index(Boot::Disk));
            }
            line.option("-device", device);
        }
        if let Some(image) = &self.cdrom {
            line.option("-blockdev", file_node("cdrom", &self.found(image, FDSET)));
            let drive = Opts::of("ide-cd")
                .with("id", "dev-cdrom")
                .with("bus", format!("ide.{CDROM_PORT}"))
                .with("drive", "cdrom");
            line.option("-device", drive.with("bootindex", self.boot_index(Boot::Cdrom)));
        }
    }

    fn boot_options(&self, line: &mut Line) {
        line.pair("-boot", "strict=on");
        if let Some(kernel) = &self.kernel {
            line.pair("-kernel", self.found(&kernel.image, OPEN_FILES));
            if let Some(initrd) = &kernel.initrd {
                line.pair("-initrd", self.found(initrd, OPEN_FILES));
            }
            line.pair("-append", &kernel.append);
        }
    }

    /// 1 for what is tried first. 0 is left to QEMU's own loader of a kernel.
    fn boot_index(&self, device: Boot) -> &'static str {
        if device == self.boot {
            "1"
        } else if device == Boot::Disk {
            "2"
        } else {
            "3"
        }
    }
}

impl Nbd {
    fn node(&self, name: &str) -> Opts {
        Opts::new()
            .with("driver", "nbd")
            .with("node-name", name)
            .with("server.type", "unix")
            .with("server.path", &self.socket)
            .with("export", &self.export)
            .with("reconnect-delay", self.reconnect_delay.as_secs().to_string())
            .with("discard", "unmap")
            .with("detect-zeroes", "unmap")
    }
}

impl Publish {
    /// QEMU's own notation.
    pub(crate) fn rule(self) -> String {
        format!("tcp:{}:{}-:{}", self.address, self.host, self.guest)
    }

    /// The notation by which QEMU takes a rule away.
    pub(crate) fn listener(self) -> String {
        format!("tcp:{}:{}", self.address, self.host)
    }
}

fn listening(id: &str, path: &str) -> Opts {
    Opts::of("socket").with("id", id).with("path", path).with("server", "on").with("wait", "off")
}

/// A file that is only read.
fn file_node(name: &str, file: &Path) -> Opts {
    let node = Opts::new().with("driver", "raw").with("node-name", name).with("read-only", "on");
    node.with("file.driver", "file").with("file.filename", file)
}

fn pci(driver: &str, id: &str, slot: usize) -> Opts {
    Opts::of(driver).with("id", id).with("bus", "pcie.0").with("addr", format!("{slot:#04x}"))
}

fn count(next: &mut usize) -> usize {
    *next += 1;
    *next - 1
}

/// The arguments so far.
#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    fn pair(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.flag(name);
        self.0.push(value.as_ref().into());
        self
    }

    fn option(&mut self, name: &str, value: Opts) -> &mut Self {
        self.pair(name, OsString::from_vec(value.0))
    }
}

/// `value,key=value,…`: QEMU's option string, in which a comma of a value is doubled.
#[derive(Default)]
struct Opts(Vec<u8>);

impl Opts {
    fn new() -> Self {
        Self::default()
    }

    fn of(head: &str) -> Self {
        let mut opts = Self::new();
        opts.value(head.as_bytes());
        opts
    }

    fn with(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.separate();
        self.0.extend_from_slice(key.as_bytes());
        self.0.push(b'=');
        self.value(value.as_ref().as_bytes());
        self
    }

    fn separate(&mut self) {
        if !self.0.is_empty() {
            self.0.push(b',');
        }
    }

    fn value(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0.push(byte);
            if byte == b',' {
                self.0.push(byte);
            }
        }
    }
}

/// Where a socket of the run folder is reached whatever the folder's length: `sun_path` has 108 bytes, a descriptor's path has few.
pub(crate) fn through(dir: &impl std::os::fd::AsRawFd, name: &str) -> PathBuf {
    Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confine::{Tracking, User};

    fn launch() -> Launch {
        Launch {
            binary: "/usr/bin/qemu-system-x86_64".into(),
            machine_type: "pc-q35-7.2".into(),
            accel: Accel::Tcg,
            cpu_model: "Nehalem".into(),
            hpet: false,
            agent: true,
            memory: 512 << 20,
            cpus: 2,
            name: "web, or so".into(),
            uuid: "8d3cc1c7-3c1d-4c0e-9a0e-2f7e4f3a4b10".into(),
            generation: None,
            run_dir: "/run/tenby/1".into(),
            log: "/logs/qemu.log".into(),
            console_log: "/logs/a,b/console.log".into(),
            disks: vec![],
            cdrom: None,
            uefi: None,
            boot: Boot::Disk,
            kernel: None,
            nic: None,
            incoming: false,
            sandbox: true,
            rights: Rights::Starter,
            low_ports: false,
        }
    }

    fn disk(id: &str, bus: Bus) -> Disk {
        Disk { id: id.into(), bus, nbd: nbd(id) }
    }

    fn nbd(id: &str) -> Nbd {
        Nbd { socket: format!("nbd-{id}.sock").into(), export: id.into(), reconnect_delay: RECONNECT_DELAY }
    }

    fn words(launch: &Launch) -> Vec<String> {
        launch.args().expect("a command line").into_iter().map(|arg| arg.into_string().expect("text")).collect()
    }

    /// The values of an option, in order.
    fn values(launch: &Launch, option: &str) -> Vec<String> {
        words(launch).windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].clone()).collect()
    }

    fn refusal(launch: &Launch) -> String {
        match launch.args() {
            Err(Error::Launch(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    /// What a guest sees: a captured machine loads only into the same. If this test fails, captured machines no longer load.
    #[test]
    fn the_whole_line() {
        let mut launch = launch();
        launch.disks = vec![disk("disk0", Bus::Virtio), disk("disk1", Bus::Ahci), disk("disk2", Bus::Scsi)];
        launch.nic = Some(Nic { mac: "52:54:00:00:00:01".into(), isolated: false });
        launch.cdrom = Some("/iso/x.iso".into());
        launch.generation = Some("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87".into());
        let expected = "-no-user-config -nodefaults -no-shutdown -S -name guest=web,,_or_so \
            -uuid 8d3cc1c7-3c1d-4c0e-9a0e-2f7e4f3a4b10 -machine pc-q35-7.2,dump-guest-core=off,mem-merge=off,hpet=off \
            -accel tcg -cpu Nehalem -m 512M -smp 2 -global ICH9-LPC.disable_s3=1 -rtc base=utc -pidfile qemu.pid \
            -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
            -chardev socket,id=qmp,path=qemu/qmp.sock,server=on,wait=off -mon chardev=qmp,mode=control \
            -chardev socket,id=qmp-spare,path=qemu/qmp-spare.sock,server=on,wait=off -mon chardev=qmp-spare,mode=control \
            -chardev stdio,id=serial0,signal=off \
            -device isa-serial,id=ttyS0,chardev=serial0 -display none -vnc unix:qemu/vnc.sock \
            -device VGA,id=vga,bus=pcie.0,addr=0x01 -object rng-builtin,id=rng0 \
            -device virtio-rng-pci,id=rng,bus=pcie.0,addr=0x03,rng=rng0 \
            -device vmgenid,id=generation,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87 \
            -device virtio-serial-pci,id=ports,bus=pcie.0,addr=0x05,max_ports=2 \
            -chardev socket,id=agent,path=qemu/agent.sock,server=on,wait=off \
            -device virtserialport,id=agent0,bus=ports.0,nr=1,chardev=agent,name=org.qemu.guest_agent.0 -netdev user,id=net0 \
            -device virtio-net-pci,id=nic0,bus=pcie.0,addr=0x02,netdev=net0,mac=52:54:00:00:00:01,romfile= \
            -device virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=0x04 \
            -blockdev driver=nbd,node-name=disk0,server.type=unix,server.path=nbd-disk0.sock,export=disk0,\
            reconnect-delay=20,discard=unmap,detect-zeroes=unmap \
            -device virtio-blk-pci,id=dev-disk0,bus=pcie.0,addr=0x08,drive=disk0,serial=disk0,werror=stop,rerror=stop,\
            bootindex=1 \
            -blockdev driver=nbd,node-name=disk1,server.type=unix,server.path=nbd-disk1.sock,export=disk1,\
            reconnect-delay=20,discard=unmap,detect-zeroes=unmap \
            -device ide-hd,id=dev-disk1,bus=ide.0,drive=disk1,serial=disk1,werror=stop,rerror=stop \
            -blockdev driver=nbd,node-name=disk2,server.type=unix,server.path=nbd-disk2.sock,export=disk2,\
            reconnect-delay=20,discard=unmap,detect-zeroes=unmap \
            -device scsi-hd,id=dev-disk2,bus=scsi0.0,scsi-id=0,drive=disk2,serial=disk2,werror=stop,rerror=stop \
            -blockdev driver=raw,node-name=cdrom,read-only=on,file.driver=file,file.filename=/iso/x.iso \
            -device ide-cd,id=dev-cdrom,bus=ide.5,drive=cdrom,bootindex=3 -boot strict=on";
        let line: Vec<_> = words(&launch).iter().map(|word| word.replace(' ', "_")).collect();
        let expected: Vec<_> = expected.split_whitespace().collect();
        assert_eq!(line, expected);
    }

    /// As above: what was captured of a machine that has one.
    #[test]
    fn an_hpet() {
        let launch = Launch { hpet: true, ..launch() };
        assert_eq!(values(&launch, "-machine"), ["pc-q35-7.2,dump-guest-core=off,mem-merge=off"]);
    }

    /// As above: what was captured of a machine without a port for an agent.
    #[test]
    fn no_agent() {
        let (with, without) = (words(&launch()), words(&Launch { agent: false, ..launch() }));
        let ports =
            |words: &[String]| words.iter().filter(|word| word.contains("agent") || word.contains("ports")).count();
        assert_eq!((ports(&with), ports(&without), with.len() - without.len()), (3, 0, 6));
    }

    /// As above: what a captured machine with UEFI loads into.
    #[test]
    fn uefi_is_flash_memory_in_two_units() {
        let mut launch = launch();
        launch.disks = vec![disk("disk0", Bus::Virtio)];
        let without = words(&launch);
        launch.uefi = Some(Uefi { code: "/m/boot/code,fd".into(), variables: nbd("firmware") });
        let machine = "pc-q35-7.2,dump-guest-core=off,mem-merge=off,hpet=off,pflash0=firmware-code,pflash1=firmware";
        assert_eq!(values(&launch, "-machine"), [machine]);
        let code = "driver=raw,node-name=firmware-code,read-only=on,file.driver=file,file.filename=/m/boot/code,,fd"
            .to_owned();
        let variables = "driver=nbd,node-name=firmware,server.type=unix,server.path=nbd-firmware.sock,export=firmware,\
            reconnect-delay=20,discard=unmap,detect-zeroes=unmap";
        assert_eq!(values(&launch, "-blockdev")[..2], [code, variables.to_owned()]);
        // Nothing else of what a guest sees is another than with a BIOS.
        let mut with = words(&launch);
        let at = with.iter().position(|word| word == "-blockdev").expect("there are some");
        with.drain(at..at + 4);
        let at = with.iter().position(|word| word == machine).expect("it is there");
        with[at] = machine.split(",pflash0").next().expect("as above").to_owned();
        assert_eq!(with, without);
    }

    #[test]
    fn commas_are_doubled_wherever_they_stand() {
        let mut launch = launch();
        launch.cdrom = Some("/a,,b/,.iso".into());
        let nbd = Nbd { socket: "/s,s".into(), export: "e,".into(), reconnect_delay: RECONNECT_DELAY };
        launch.disks = vec![Disk { nbd, ..disk("disk0", Bus::Virtio) }];
        let nodes = values(&launch, "-blockdev");
        assert!(nodes[0].contains("server.path=/s,,s,export=e,,,reconnect-delay="), "{}", nodes[0]);
        assert!(nodes[1].ends_with("file.filename=/a,,,,b/,,.iso"), "{}", nodes[1]);
    }

    #[test]
    fn a_path_that_is_no_text() {
        let mut launch = launch();
        launch.cdrom = Some(OsString::from_vec(b"/\xff,".to_vec()).into());
        let args = launch.args().expect("a command line");
        assert!(args.iter().any(|arg| arg.as_bytes().ends_with(b"file.filename=/\xff,,")));
    }

    #[test]
    fn a_kernel_takes_the_first_place() {
        let mut launch = launch();
        let append = "console=ttyS0 a,b".to_owned();
        launch.kernel = Some(Kernel { image: "/boot/k,".into(), initrd: Some("/boot/i".into()), append });
        launch.disks = vec![disk("disk0", Bus::Virtio)];
        // These options are no lists: their values stand as they are.
        assert_eq!(values(&launch, "-kernel"), ["/boot/k,"]);
        assert_eq!(values(&launch, "-initrd"), ["/boot/i"]);
        assert_eq!(values(&launch, "-append"), ["console=ttyS0 a,b"]);
        assert!(!words(&launch).iter().any(|word| word.contains("bootindex=0")));
    }

    #[test]
    fn a_user_of_its_own_gets_its_files_open() {
        let mut launch = launch();
        launch.cdrom = Some("/root/x.iso".into());
        launch.uefi = Some(Uefi { code: "/m/boot/code".into(), variables: nbd("firmware") });
        launch.kernel = Some(Kernel { image: "/m/k".into(), initrd: Some("/m/i".into()), append: String::new() });
        let without = words(&launch);
        launch.rights = Rights::User(User::of(1), Tracking::Device);
        assert_eq!(launch.files(), ["/m/boot/code", "/root/x.iso", "/m/k", "/m/i"].map(Path::new));
        assert_eq!(values(&launch, "-add-fd"), ["fd=100,set=100", "fd=101,set=101"]);
        assert_eq!(values(&launch, "-kernel"), ["/proc/self/fd/102"]);
        assert_eq!(values(&launch, "-initrd"), ["/proc/self/fd/103"]);
        let nodes = values(&launch, "-blockdev");
        assert!(nodes[0].ends_with("file.filename=/dev/fdset/100"), "{}", nodes[0]);
        assert!(nodes[2].ends_with("file.filename=/dev/fdset/101"), "{}", nodes[2]);
        // A guest sees nothing of it.
        assert_eq!(words(&launch).len(), without.len() + 4 - 2);
        assert_eq!(values(&launch, "-device"), values(&Launch { rights: Rights::NoMore, ..launch.clone() }, "-device"));
    }

    #[test]
    fn what_is_tried_first() {
        let mut launch = launch();
        launch.disks = vec![disk("disk0", Bus::Virtio), disk("disk1", Bus::Virtio)];
        launch.cdrom = Some("/x.iso".into());
        launch.nic = Some(Nic { mac: "52:54:00:00:00:01".into(), isolated: false });
        let order = |boot| {
            let launch = Launch { boot, ..launch.clone() };
            let devices = values(&launch, "-device");
            let index = |id: &str| {
                let device = devices.iter().find(|device| device.contains(&format!("id={id}"))).expect("the device");
                device.split("bootindex=").nth(1).map(|rest| rest.parse::<u32>().expect("a number"))
            };
            [index("dev-disk0"), index("dev-disk1"), index("dev-cdrom"), index("nic0")]
        };
        assert_eq!(order(Boot::Disk), [Some(1), None, Some(3), None]);
        assert_eq!(order(Boot::Cdrom), [Some(2), None, Some(1), None]);
        assert_eq!(order(Boot::Net), [Some(2), None, Some(3), Some(1)]);
    }

    #[test]
    fn an_isolated_network_is_the_same_to_the_guest() {
        let with = |isolated| Launch { nic: Some(Nic { mac: "52:54:00:00:00:01".into(), isolated }), ..launch() };
        assert_eq!(values(&with(false), "-netdev"), ["user,id=net0"]);
        assert_eq!(values(&with(true), "-netdev"), ["user,id=net0,restrict=on"]);
        assert_eq!(values(&with(false), "-device"), values(&with(true), "-device"));
    }

    #[test]
    fn places_are_fixed_by_the_order_of_disks() {
        let mut launch = launch();
        launch.disks = (0..16).map(|n| disk(&format!("disk{n}"), Bus::Virtio)).collect();
        launch.disks.extend((16..21).map(|n| disk(&format!("disk{n}"), Bus::Ahci)));
        let devices = values(&launch, "-device").join(" ");
        for (place, id) in [("addr=0x08", 0), ("addr=0x17", 15), ("bus=ide.0", 16), ("bus=ide.4", 20)] {
            let device = devices.split(' ').find(|device| device.contains(place)).expect("the place is taken");
            assert!(device.contains(&format!("drive=disk{id},")), "{device}");
        }
        launch.disks.push(disk("disk21", Bus::Ahci));
        assert!(refusal(&launch).contains('6'));
    }

    #[test]
    fn what_cannot_be_launched() {
        let good = launch();
        let bad = |change: fn(&mut Launch)| {
            let mut launch = good.clone();
            change(&mut launch);
            refusal(&launch)
        };
        assert!(bad(|l| l.memory = 0).contains("memory"));
        assert!(bad(|l| l.memory = (1 << 20) + 1).contains("memory"));
        assert!(bad(|l| l.cpus = 0).contains("processors"));
        assert!(bad(|l| l.cpus = 256).contains("processors"));
        assert!(bad(|l| l.run_dir = "run".into()).contains("absolute"));
        assert!(bad(|l| l.cdrom = Some("x.iso".into())).contains("x.iso"));
        assert!(bad(|l| l.boot = Boot::Cdrom).contains("CD"));
        assert!(bad(|l| l.boot = Boot::Net).contains("network"));
        assert!(bad(|l| l.disks = vec![disk("d", Bus::Scsi), disk("d", Bus::Ahci)]).contains("two disks"));
        let uefi =
            |code: &str| Launch { uefi: Some(Uefi { code: code.into(), variables: nbd("firmware") }), ..good.clone() };
        assert!(refusal(&uefi("code.fd")).contains("code.fd"));
        for id in ["", "0disk", "Disk", "disk_0", "a,b", "cdrom", "firmware", "firmware-code", "disk-with-a-long-name"]
        {
            let launch = Launch { disks: vec![disk(id, Bus::Virtio)], ..good.clone() };
            assert!(refusal(&launch).contains("no id"), "{id}");
        }
    }
}
