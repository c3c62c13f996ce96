//! A QEMU for a test: started, spoken to, and killed when dropped.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a socket may take to appear or to answer before the test gives up: for a machine that hangs, not a measure.
const PATIENCE: Duration = Duration::from_secs(60);

/// A QEMU of this version (`7.2`, `10.0`): where the variable says, or where `cargo xtask` puts it. Says so if there is none.
pub(crate) fn emulator(version: &str) -> Option<PathBuf> {
    let variable = format!("TENBY_QEMU_{}", if version == "7.2" { "72" } else { "10" });
    let ours = || {
        let target = std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"), PathBuf::from);
        let path = target.join("qemu").join(version).join("qemu-system-x86_64");
        path.exists().then_some(path)
    };
    let found = std::env::var_os(&variable).map(PathBuf::from).or_else(ours);
    if found.is_none() {
        eprintln!("SKIPPED: no QEMU {version}; run `cargo xtask qemu` or set {variable}");
    }
    found
}

/// A guest: its RAM, and where in it its firmware works.
///
/// The firmware, 64 KiB that run in real mode with flat data, goes round for ever: it writes 0xbe00 + n to the beginning of page n
/// of [`PAGES`], says `!` on the debug port, and counts 65,536 times.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guest {
    /// RAM in MiB.
    pub(crate) ram: u32,
    /// Where the pages are, guest-physical.
    pub(crate) pages_at: u32,
}

/// How many pages the firmware writes.
pub(crate) const PAGES: u64 = 16;

/// A guest whose stream is small.
pub(crate) const SMALL: Guest = Guest { ram: 4, pages_at: 2 << 20 };
/// A guest whose stream does not fit into a socket, and that works on pages which come late in it.
pub(crate) const LARGE: Guest = Guest { ram: 256, pages_at: 240 << 20 };

impl Guest {
    /// Where it counts, in 32 bits, guest-physical.
    pub(crate) fn counter(self) -> u64 {
        u64::from(self.pages_at) + 0xf008
    }

    fn firmware(self) -> Vec<u8> {
        const GDT: usize = 0x100;
        let [b0, b1, b2, b3] = self.pages_at.to_le_bytes();
        #[rustfmt::skip]
        let code = [
            0xfa,                                     //       cli
            0x2e, 0x0f, 0x01, 0x16, 0x10, 0x01,       //       lgdt cs:[0x110]
            0x0f, 0x20, 0xc0,                         //       mov eax, cr0
            0x0c, 0x01,                               //       or al, 1
            0x0f, 0x22, 0xc0,                         //       mov cr0, eax
            0xbb, 0x08, 0x00,                         //       mov bx, 8
            0x8e, 0xdb,                               //       mov ds, bx       ; flat from now on
            0x24, 0xfe,                               //       and al, 0xfe
            0x0f, 0x22, 0xc0,                         //       mov cr0, eax
            0xba, 0x02, 0x04,                         //       mov dx, 0x402
            0x66, 0xbf, b0, b1, b2, b3,               // fill: mov edi, pages_at
            0xb8, 0x00, 0xbe,                         //       mov ax, 0xbe00
            0x67, 0x89, 0x07,                         // page: mov [edi], ax
            0x40,                                     //       inc ax
            0x66, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, //       add edi, 0x1000
            0x3c, PAGES as u8,                        //       cmp al, PAGES
            0x75, 0xf1,                               //       jnz page
            0xb0, b'!',                               //       mov al, '!'
            0xee,                                     //       out dx, al
            0x67, 0xff, 0x87, 0x08, 0xf0, 0xff, 0xff, // more: inc word [edi - 0xff8]
            0x75, 0xf7,                               //       jnz more
            0x67, 0xff, 0x87, 0x0a, 0xf0, 0xff, 0xff, //       inc word [edi - 0xff6]
            0xeb, 0xd3,                               //       jmp fill
        ];
        let mut image = vec![0; 64 << 10];
        image[..code.len()].copy_from_slice(&code);
        // A descriptor of nothing, one of all data, and where they are.
        image[GDT + 8..GDT + 16].copy_from_slice(&[0xff, 0xff, 0, 0, 0, 0x92, 0xcf, 0]);
        image[GDT + 16..GDT + 22].copy_from_slice(&[15, 0, 0x00, 0x01, 0x0f, 0x00]);
        // The processor starts here: jmp 0xf000:0
        image[0xfff0..0xfff5].copy_from_slice(&[0xea, 0x00, 0x00, 0x00, 0xf0]);
        image
    }
}

/// A running QEMU.
pub(crate) struct Qemu {
    child: Child,
    qmp: BufReader<UnixStream>,
    /// Events that came while something else was waited for.
    events: VecDeque<Value>,
    folder: TempDir,
}

impl Qemu {
    /// Starts a stopped machine of this type with this guest.
    pub(crate) fn start(emulator: &Path, machine: &str, guest: Guest, more: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("firmware"), guest.firmware()).unwrap();
        let child = Command::new(emulator)
            .current_dir(folder.path())
            .args([
                "-machine",
                &format!("{machine},accel=tcg"),
                "-m",
                &format!("{}M", guest.ram),
                "-S",
                "-bios",
                "firmware",
            ])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-shutdown"])
            .args(["-qmp", "unix:qmp,server=on,wait=off"])
            .args(["-chardev", "socket,id=debug,path=debug,server=on,wait=off"])
            .args(["-device", "isa-debugcon,iobase=0x402,chardev=debug"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let qmp = BufReader::new(connect(&folder.path().join("qmp")));
        let mut qemu = Self { child, qmp, events: VecDeque::new(), folder };
        qemu.wait_for(|message| message.get("QMP").is_some());
        qemu.command("qmp_capabilities", &json!({}));
        qemu.capability("events");
        qemu
    }

    /// Starts a machine that waits for a stream.
    pub(crate) fn start_incoming(emulator: &Path, machine: &str, guest: Guest) -> Self {
        Self::start(emulator, machine, guest, &["-incoming", "defer"])
    }

    /// Lets the machine run until it has spoken twice on its debug port, so that it has counted in between.
    pub(crate) fn run_until_it_speaks(&mut self) {
        let mut debug = connect(&self.folder.path().join("debug"));
        // QEMU takes notice of the connection in its main loop, as of the command that follows: a query orders the two.
        self.command("query-chardev", &json!({}));
        self.command("cont", &json!({}));
        let mut said = [0; 2];
        debug.read_exact(&mut said).unwrap();
        assert_eq!(said, *b"!!");
    }

    /// Executes a command; its answer, or QEMU's words.
    pub(crate) fn try_command(&mut self, name: &str, arguments: &Value) -> Result<Value, String> {
        self.send(name, arguments, None);
        let mut answer = self.wait_for(|message| message.get("return").or(message.get("error")).is_some());
        match answer.get("error") {
            Some(error) => Err(error.to_string()),
            None => Ok(answer["return"].take()),
        }
    }

    pub(crate) fn command(&mut self, name: &str, arguments: &Value) -> Value {
        self.try_command(name, arguments).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub(crate) fn capability(&mut self, name: &str) {
        let capabilities = json!({"capabilities": [{"capability": name, "state": true}]});
        self.command("migrate-set-capabilities", &capabilities);
    }

    /// Gives QEMU one end of a socket pair under the name `stream`; the other end.
    pub(crate) fn stream(&mut self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.send("getfd", &json!({"fdname": "stream"}), Some(&theirs));
        let answer = self.wait_for(|message| message.get("return").or(message.get("error")).is_some());
        assert!(answer.get("error").is_none(), "{answer}");
        ours
    }

    /// Begins an outgoing migration; its stream.
    pub(crate) fn migrate(&mut self) -> UnixStream {
        let stream = self.stream();
        self.command("migrate", &json!({"uri": "fd:stream"}));
        stream
    }

    /// Begins an incoming migration; its stream.
    pub(crate) fn incoming(&mut self) -> UnixStream {
        let stream = self.stream();
        self.command("migrate-incoming", &json!({"uri": "fd:stream"}));
        stream
    }

    /// Goes on with an incoming migration whose source is gone; its new stream.
    pub(crate) fn recovering(&mut self) -> UnixStream {
        let stream = self.stream();
        self.command("migrate-recover", &json!({"uri": "fd:stream"}));
        stream
    }

    /// Waits until the migration has ended; how.
    pub(crate) fn migration_end(&mut self) -> String {
        self.migration_is_one_of(&["completed", "failed", "cancelled"])
    }

    /// Waits until the migration is in this state.
    pub(crate) fn migration_is(&mut self, status: &str) {
        self.migration_is_one_of(&[status]);
    }

    fn migration_is_one_of(&mut self, wanted: &[&str]) -> String {
        loop {
            let event =
                self.events.pop_front().unwrap_or_else(|| self.wait_for(|message| message.get("event").is_some()));
            match event["data"]["status"].as_str() {
                Some(status) if event["event"] == "MIGRATION" && wanted.contains(&status) => return status.into(),
                _ => {}
            }
        }
    }

    pub(crate) fn status(&mut self) -> String {
        self.command("query-status", &json!({}))["status"].as_str().unwrap().into()
    }

    /// Guest-physical memory, as QEMU sees it.
    pub(crate) fn memory(&mut self, at: u64, len: u64) -> Vec<u8> {
        let path = self.folder.path().join("memory");
        self.command("pmemsave", &json!({"val": at, "size": len, "filename": path.to_str().unwrap()}));
        std::fs::read(path).unwrap()
    }

    fn send(&mut self, name: &str, arguments: &Value, file: Option<&UnixStream>) {
        let line = format!("{}\n", json!({"execute": name, "arguments": arguments}));
        let socket = self.qmp.get_mut();
        let Some(file) = file else { return socket.write_all(line.as_bytes()).unwrap() };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        let sent = sendmsg(socket, &[IoSlice::new(line.as_bytes())], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, line.len());
    }

    /// The next message that is one of these; events that come before are kept.
    fn wait_for(&mut self, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        loop {
            let mut line = String::new();
            let len = self.qmp.read_line(&mut line).expect("QEMU answers");
            assert!(len > 0, "QEMU has ended");
            let message: Value = serde_json::from_str(&line).unwrap();
            if wanted(&message) {
                return message;
            }
            self.events.extend(message.get("event").is_some().then_some(message));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.qmp.get_ref().shutdown(Shutdown::Both);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects to a socket that is about to appear.
fn connect(path: &Path) -> UnixStream {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => {
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                return socket;
            }
            Err(error) if start.elapsed() > PATIENCE => panic!("{}: {error}", path.display()),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
