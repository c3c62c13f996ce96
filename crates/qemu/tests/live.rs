//! Against real QEMUs, without a kernel: the firmware alone is guest enough here.
//!
//! Every test runs with each QEMU that is there: `TENBY_QEMU_72`, `TENBY_QEMU_10`, else the one that Tenby would use.

use qemu::{
    Accel, Boot, Bus, Capture, CaptureMode, Console, ConsoleReader, Disk, Ending, Error, EventKind, Identity,
    Installed, Launch, MigrationStatus, Nbd, Nic, Publish, Qemu, RestoreMode, Rights, RunState,
};
use std::future::Future;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// No test waits longer than this for anything. Far beyond what a loaded machine needs: it turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(120);

fn binaries() -> Vec<PathBuf> {
    let named: Vec<_> =
        ["TENBY_QEMU_72", "TENBY_QEMU_10"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    if !named.is_empty() {
        return named;
    }
    match qemu::find_binary() {
        Ok(binary) => vec![binary],
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            vec![]
        }
    }
}

/// Runs `test` with each QEMU, in a runtime of its own.
fn with_each<F: Future<Output = ()>>(test: impl Fn(Place) -> F) {
    for binary in binaries() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let installed = Installed::probe(&binary).await.expect("it answers");
            eprintln!("QEMU {} at {}", installed.version, binary.display());
            let place = Place { dir: tempfile::tempdir().expect("a folder"), installed };
            tokio::time::timeout(PATIENCE, test(place)).await.expect("it did not hang");
        });
    }
}

/// A folder for the machines of a test.
struct Place {
    dir: TempDir,
    installed: Installed,
}

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A machine of 64 MiB whose sockets lie in `run`.
    fn launch(&self, run: &str) -> Launch {
        let run_dir = self.path(run);
        if !run_dir.exists() {
            std::fs::create_dir(&run_dir).expect("the run folder");
            qemu::prepare(&run_dir, Rights::Starter).expect("QEMU's own");
        }
        Launch {
            binary: self.installed.binary.clone(),
            machine_type: "pc-q35-7.2".into(),
            accel: Accel::Tcg,
            cpu_model: qemu::cpu_model(Accel::Tcg).into(),
            hpet: false,
            agent: true,
            memory: 64 << 20,
            cpus: 1,
            name: "a, machine".into(),
            uuid: "8d3cc1c7-3c1d-4c0e-9a0e-2f7e4f3a4b10".into(),
            generation: Some("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87".into()),
            run_dir,
            log: self.path("qemu, its log"),
            console_log: self.path("console, its log"),
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
}

impl Place {
    /// The same with [`GUEST`] on its CD.
    fn launch_guest(&self, run: &str) -> Launch {
        let iso = self.path("guest, the.iso");
        std::fs::write(&iso, bootable_iso(GUEST)).expect("the ISO");
        Launch { cdrom: Some(iso), boot: Boot::Cdrom, ..self.launch(run) }
    }

    fn console(&self) -> Console {
        Console::open(&self.path("console, its log")).expect("the console")
    }
}

/// A guest of 90 bytes. It prints `READY` and a line's end on the serial port; then it answers each byte with that byte and the next
/// letter of the alphabet, which it counts in RAM; `Q` powers off.
///
/// ```text
///       cli; xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,7c00h; cld
///       mov si,msg
/// print lodsb; or al,al; jz wait; call put; jmp print
/// wait  mov dx,3fdh; in al,dx; test al,1; jz wait
///       mov dx,3f8h; in al,dx; cmp al,'Q'; je off; call put
///       mov al,[count]; inc al; mov [count],al; call put; jmp wait
/// off   mov dx,604h; mov ax,2000h; out dx,ax; jmp off
/// put   push ax; mov dx,3fdh
/// busy  in al,dx; test al,20h; jz busy
///       pop ax; mov dx,3f8h; out dx,al; ret
/// count db '@'
/// msg   db 'READY',10,0
/// ```
const GUEST: &[u8] = b"\xfa\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0\xbc\x00\x7c\xfc\xbe\x53\x7c\xac\x08\xc0\x74\x05\xe8\x2b\x00\
\xeb\xf6\xba\xfd\x03\xec\xa8\x01\x74\xf8\xba\xf8\x03\xec\x3c\x51\x74\x10\xe8\x16\x00\xa0\x52\x7c\xfe\xc0\xa2\x52\x7c\xe8\x0b\x00\
\xeb\xe0\xba\x04\x06\xb8\x00\x20\xef\xeb\xf7\x50\xba\xfd\x03\xec\xa8\x20\x74\xfb\x58\xba\xf8\x03\xee\xc3@READY\n\0";

/// An ISO that boots `code` (El Torito, no emulation).
fn bootable_iso(code: &[u8]) -> Vec<u8> {
    let mut iso = vec![0; 21 * 2048];
    let mut put = |at: usize, bytes: &[u8]| iso[at..at + bytes.len()].copy_from_slice(bytes);
    put(16 * 2048, b"\x01CD001\x01");
    put(17 * 2048, b"\x00CD001\x01EL TORITO SPECIFICATION");
    put(17 * 2048 + 0x47, &19u32.to_le_bytes());
    put(18 * 2048, b"\xffCD001\x01");
    // Validation entry: its words add up to zero.
    put(19 * 2048, b"\x01");
    put(19 * 2048 + 28, &0u16.wrapping_sub(0x0001).wrapping_sub(0xaa55).to_le_bytes());
    put(19 * 2048 + 30, b"\x55\xaa");
    put(19 * 2048 + 32, b"\x88\0\0\0\0\0\x04\0");
    put(19 * 2048 + 40, &20u32.to_le_bytes());
    put(20 * 2048, code);
    iso
}

/// Reads until what was read since the call ends with `wanted`.
async fn expect(reader: &mut ConsoleReader, wanted: &str) -> String {
    let mut seen = String::new();
    while !seen.ends_with(wanted) {
        let bytes = reader.next().await.expect("it reads").expect("the console lives");
        seen.push_str(&String::from_utf8_lossy(&bytes));
    }
    seen
}

/// A process that does not outlive its test.
struct Guard(Option<Qemu>);

impl std::ops::Deref for Guard {
    type Target = Qemu;
    fn deref(&self) -> &Qemu {
        self.0.as_ref().expect("guarded")
    }
}

/// Ends a process that a test has let go of, if it fails before it has it back.
struct Leash(Identity);

impl Drop for Leash {
    fn drop(&mut self) {
        if qemu::alive(self.0) {
            let pid = rustix::process::Pid::from_raw(self.0.pid).expect("a process id");
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// The process's handle without its guard.
fn abandon(mut guard: Guard) -> Option<Qemu> {
    guard.0.take()
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(qemu) = &self.0 else { return };
        let pid = rustix::process::Pid::from_raw(qemu.identity().pid).expect("a process id");
        if !matches!(qemu.state(), RunState::Exited(_)) {
            // It may have ended meanwhile, but nobody has reaped it.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

async fn start(launch: &Launch) -> Guard {
    Guard(Some(Qemu::start(launch).await.expect("it starts")))
}

async fn reach(qemu: &Qemu, state: RunState) {
    qemu.watch().wait_for(|now| *now == state).await.expect("the watch lives");
}

/// Whether this host lets QEMU capture a guest that runs; if not, that it says so.
async fn in_background(qemu: &Qemu) -> bool {
    let can = qemu.captures_in_background();
    assert_eq!(can.is_ok(), qemu::userfaultfd().is_ok());
    possible(qemu, can).await
}

/// Whether this QEMU captures a guest that stands still and leaves it so; if not, that it says so.
async fn standing(qemu: &Qemu) -> bool {
    let can = qemu.captures_standing().await;
    assert_eq!(can.is_ok(), qemu::userfaultfd().is_ok() && qemu.qmp().version().major >= 9);
    possible(qemu, can).await
}

async fn possible(qemu: &Qemu, can: Result<(), Error>) -> bool {
    let Err(error) = can else { return true };
    eprintln!("SKIPPED for this QEMU: {error}");
    let capture = qemu.capture(CaptureMode::Background).await;
    assert!(matches!(capture, Err(Error::Unsupported(_))));
    assert_eq!(qemu.qmp().migration().await.expect("an answer").status, MigrationStatus::None);
    false
}

/// Reads a capture's stream to its end in a thread.
fn collect(capture: &mut Capture) -> std::thread::JoinHandle<Vec<u8>> {
    let mut stream = capture.reader();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("the stream");
        bytes
    })
}

/// Starts a guest, and waits until it answers.
async fn start_guest(place: &Place, run: &str) -> (Guard, Console, ConsoleReader) {
    let console = place.console();
    let mut reader = console.reader();
    let qemu = start(&place.launch_guest(run)).await;
    qemu.attach_console(&console).expect("the serial port");
    qemu.resume().await.expect("resume");
    expect(&mut reader, "READY\n").await;
    (qemu, console, reader)
}

/// Brings a captured machine up in a new process.
async fn restore(launch: Launch, stream: Vec<u8>) -> Guard {
    let qemu = start(&Launch { incoming: true, ..launch }).await;
    assert_eq!(qemu.state(), RunState::Incoming);
    let mut restore = qemu.restore(RestoreMode::Eager).await.expect("it accepts a stream");
    let mut writer = restore.writer();
    let thread = std::thread::spawn(move || writer.write_all(&stream));
    restore.loaded().await.expect("it loads");
    thread.join().expect("the thread").expect("all was taken");
    assert_eq!(qemu.state(), RunState::Paused);
    qemu
}

#[test]
fn it_starts_stops_and_goes_on() {
    with_each(|place| async move {
        let qemu = start(&place.launch("run")).await;
        assert_eq!(qemu.state(), RunState::Paused);
        let mut events = qemu.events();
        qemu.resume().await.expect("resume");
        assert_eq!(qemu.state(), RunState::Running);
        qemu.pause().await.expect("pause");
        assert_eq!(qemu.state(), RunState::Paused);
        let (first, second) = (events.next().await.expect("RESUME"), events.next().await.expect("STOP"));
        assert_eq!((first.kind, second.kind), (EventKind::Resume, EventKind::Stop));
        assert!(first.at.expect("a stamp") <= second.at.expect("a stamp"));
        qemu.resume().await.expect("resume");
        qemu.reset().await.expect("reset");
        assert_eq!(qemu.state(), RunState::Running);
        assert_eq!(qemu.quit(PATIENCE).await.expect("quit"), Ending::Exited(0));
        reach(&qemu, RunState::Exited(Ending::Exited(0))).await;
        assert!(matches!(qemu.pause().await, Err(Error::Disconnected)));
    });
}

#[test]
fn a_foreign_iso_boots_and_its_console_is_served() {
    with_each(|place| async move {
        let (qemu, console, mut reader) = start_guest(&place, "run").await;
        console.write(b"x").await.expect("typed");
        expect(&mut reader, "xA").await;
        let mut late = console.reader();
        assert!(expect(&mut late, "xA").await.contains("READY\n"));
        console.write(b"y").await.expect("typed");
        expect(&mut reader, "yB").await;
        expect(&mut late, "yB").await;

        // Nobody is attached: what was printed meanwhile is neither lost nor doubled.
        drop(console);
        let console = place.console();
        let error = console.write(b"z").await.expect_err("nobody is there");
        assert!(matches!(error, Error::ConsoleDetached { delivered: 0, length: 1 }), "{error}");
        qemu.attach_console(&console).expect("the serial port");
        console.write(b"z").await.expect("typed");
        let mut reader = console.reader();
        let all = expect(&mut reader, "zC").await;
        assert!(all.ends_with("READY\nxAyBzC"), "{all:?}");

        console.write(b"Q").await.expect("typed");
        reach(&qemu, RunState::Shutdown).await;
        let mut attached = console.attached();
        qemu.quit(PATIENCE).await.expect("quit");
        attached.wait_for(|attached| !attached).await.expect("the console lives");
    });
}

/// A CD-ROM that nobody here made, from Debian's package grub-rescue-pc.
const GRUB: &str = "/usr/lib/grub-rescue/grub-rescue-cdrom.iso";

#[test]
fn a_foreign_cd_boots() {
    if !Path::new(GRUB).exists() {
        eprintln!("SKIPPED: there is no {GRUB}");
        return;
    }
    with_each(|place| async move {
        let qemu = start(&Launch { cdrom: Some(GRUB.into()), boot: Boot::Cdrom, ..place.launch("run") }).await;
        qemu.resume().await.expect("resume");
        while !text_screen(&qemu).await.contains("GNU GRUB") {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

/// What stands on a screen in text mode: every other byte of the video memory.
async fn text_screen(qemu: &Qemu) -> String {
    let dump = qemu.qmp().human("xp /4000bx 0xb8000").await.expect("the memory");
    let bytes = dump.split_whitespace().filter_map(|word| u8::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    bytes.step_by(2).map(char::from).collect()
}

#[test]
fn memory_is_captured_while_the_guest_runs_and_restored() {
    with_each(|place| async move {
        let (qemu, console, mut reader) = start_guest(&place, "first").await;
        if !in_background(&qemu).await {
            return;
        }
        console.write(b"x").await.expect("typed");
        expect(&mut reader, "xA").await;

        let mut capture = qemu.capture(CaptureMode::Background).await.expect("it begins");
        let stream = collect(&mut capture);
        let point = capture.point().await.expect("a point");
        assert!(point.stopped < point.resumed);
        console.write(b"y").await.expect("typed");
        capture.finished().await.expect("it completes");
        let stream = stream.join().expect("the stream");
        eprintln!("pause {} µs, stream {} bytes", point.pause_micros(), stream.len());
        assert_eq!(&stream[..4], b"QEVM");
        assert_eq!(qemu.state(), RunState::Running);
        expect(&mut reader, "yB").await;
        assert_eq!(capture.before_point().await.expect("an answer"), None);

        // The same process can be captured again.
        let mut capture = qemu.capture(CaptureMode::Background).await.expect("it begins again");
        let again = collect(&mut capture);
        capture.point().await.expect("a point");
        capture.finished().await.expect("it completes");
        assert_eq!(&again.join().expect("the stream")[..4], b"QEVM");
        qemu.pause().await.expect("pause");

        // Taken back: the second letter is B again, on the same console.
        let old = qemu;
        let qemu = restore(place.launch_guest("second"), stream).await;
        qemu.attach_console(&console).expect("the serial port");
        old.kill().await.expect("kill");
        qemu.resume().await.expect("resume");
        console.write(b"z").await.expect("typed");
        expect(&mut reader, "zB").await;

        // What was restored can be captured too.
        let mut capture = qemu.capture(CaptureMode::Background).await.expect("it begins");
        let stream = collect(&mut capture);
        capture.point().await.expect("a point");
        capture.finished().await.expect("it completes");
        assert!(!stream.join().expect("the stream").is_empty());
    });
}

/// A capture leaves RAM in small pages; each QEMU can be asked where its RAM is, and has it in huge pages again.
#[test]
fn memory_that_was_captured_is_put_into_huge_pages_again() {
    with_each(|place| async move {
        let (qemu, console, mut reader) = start_guest(&place, "first").await;
        if let Err(why) = qemu::collapses() {
            eprintln!("SKIPPED: {why}");
            return;
        }
        if !in_background(&qemu).await {
            return;
        }
        let mut capture = qemu.capture(CaptureMode::Background).await.expect("it begins");
        let stream = collect(&mut capture);
        capture.point().await.expect("a point");
        capture.finished().await.expect("it completes");
        stream.join().expect("the stream");

        // The guest's own code is in the first piece. What is beyond RAM, or in no block, is passed over.
        let beyond = [("pc.ram".to_owned(), 1 << 40), ("no block".to_owned(), 0)];
        assert_eq!(qemu.collapse(&beyond, || Duration::ZERO).await.expect("it begins").ended().await, 0);
        let before = in_huge_pages(&qemu);
        let first = [("pc.ram".to_owned(), 0)];
        assert_eq!(qemu.collapse(&first, || Duration::ZERO).await.expect("it begins").ended().await, 1);
        assert!(in_huge_pages(&qemu) >= before + qemu::HUGE_PAGE);
        console.write(b"x").await.expect("typed");
        expect(&mut reader, "xA").await;
    });
}

/// Bytes of huge pages that a process has, as the kernel counts them.
fn in_huge_pages(qemu: &Qemu) -> u64 {
    let counts = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", qemu.identity().pid)).expect("it lives");
    let line = counts.lines().find_map(|line| line.strip_prefix("AnonHugePages:")).expect("they are counted");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Without the host's help: written again and again until little is left.
#[test]
fn memory_of_a_guest_that_runs_converges() {
    with_each(|place| async move {
        let (qemu, console, mut reader) = start_guest(&place, "run").await;
        console.write(b"x").await.expect("typed");
        expect(&mut reader, "xA").await;
        for number in 0..2 {
            let mut capture = qemu.capture(CaptureMode::Converging).await.expect("it begins");
            let stream = collect(&mut capture);
            capture.converged().await.expect("it stands still");
            assert_eq!(qemu.state(), RunState::Paused);
            capture.go_on().await.expect("it goes on");
            capture.finished().await.expect("it completes");
            qemu.resume().await.expect("resume");
            let stream = stream.join().expect("the stream");

            let copy = restore(place.launch_guest(&format!("copy{number}")), stream).await;
            copy.attach_console(&console).expect("the serial port");
            copy.resume().await.expect("resume");
            console.write(b"y").await.expect("typed");
            expect(&mut reader, "yB").await;
            copy.kill().await.expect("kill");
            qemu.attach_console(&console).expect("the serial port");
        }

        // Given up before and after it stands still.
        for converged in [false, true] {
            let mut capture = qemu.capture(CaptureMode::Converging).await.expect("it begins");
            let stream = collect(&mut capture);
            if converged {
                capture.converged().await.expect("it stands still");
            }
            capture.cancel().await.expect("it is given up");
            stream.join().expect("the stream");
            assert_eq!(qemu.state(), RunState::Running, "{converged}");
        }
        console.write(b"z").await.expect("typed");
        expect(&mut reader, "zB").await;
    });
}

#[test]
fn memory_of_a_guest_that_stands_still() {
    with_each(|place| async move {
        let (qemu, console, mut reader) = start_guest(&place, "run").await;
        console.write(b"x").await.expect("typed");
        expect(&mut reader, "xA").await;
        let error = qemu.capture(CaptureMode::Stopped).await.expect_err("it runs");
        assert!(matches!(error, Error::Unsupported(_)), "{error}");
        qemu.pause().await.expect("pause");

        for (number, mode) in [CaptureMode::Background, CaptureMode::Stopped].into_iter().enumerate() {
            if mode == CaptureMode::Background && !standing(&qemu).await {
                continue;
            }
            let mut capture = qemu.capture(mode).await.expect("it begins");
            let stream = collect(&mut capture);
            capture.finished().await.expect("it completes");
            let error = capture.point().await.expect_err("there is no point");
            assert!(matches!(error, Error::Migration { how: "interrupted", .. }), "{error}");
            assert_eq!(qemu.state(), RunState::Paused);
            let stream = stream.join().expect("the stream");
            let copy = restore(place.launch_guest(&format!("copy{number}")), stream).await;
            copy.attach_console(&console).expect("the serial port");
            copy.resume().await.expect("resume");
            console.write(b"y").await.expect("typed");
            expect(&mut reader, "yB").await;
        }
        let error = qemu.capture(CaptureMode::Stopped).await.expect_err("not from there");
        assert!(matches!(error, Error::Refused { .. }), "{error}");
        qemu.pause_anew().await.expect("an ordinary pause");
        qemu.pause_anew().await.expect("of which nothing is made");
        let mut capture = qemu.capture(CaptureMode::Stopped).await.expect("it begins");
        let stream = collect(&mut capture);
        capture.finished().await.expect("it completes");
        stream.join().expect("the stream");

        qemu.attach_console(&console).expect("the serial port");
        qemu.resume().await.expect("resume after all");
        console.write(b"z").await.expect("typed");
        expect(&mut reader, "zB").await;
    });
}

#[test]
fn a_guest_that_stood_still_may_run_before_the_end() {
    with_each(|place| async move {
        let (qemu, console, mut reader) = start_guest(&place, "run").await;
        qemu.pause().await.expect("pause");
        if !standing(&qemu).await {
            return;
        }
        let mut capture = qemu.capture(CaptureMode::Background).await.expect("it begins");
        let mut stream = capture.reader();
        let (tell, arrived) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            // More than the block list: a page has arrived.
            let mut start = vec![0; 64 << 10];
            stream.read_exact(&mut start).expect("the stream");
            tell.send(()).expect("somebody waits");
            stream.read_to_end(&mut start).expect("the stream");
            start
        });
        arrived.await.expect("the thread");
        capture.release().await.expect("it runs");
        console.write(b"x").await.expect("typed");
        expect(&mut reader, "xA").await;
        capture.finished().await.expect("it completes");
        assert_eq!(qemu.state(), RunState::Running);

        let stream = thread.join().expect("the stream");
        let copy = restore(place.launch_guest("copy"), stream).await;
        copy.attach_console(&console).expect("the serial port");
        copy.resume().await.expect("resume");
        console.write(b"y").await.expect("typed");
        expect(&mut reader, "yA").await;
    });
}

#[test]
fn a_capture_that_is_given_up_leaves_the_guest_running() {
    with_each(|place| async move {
        let launch = place.launch_guest("run");
        let (qemu, console, mut reader) = start_guest(&place, "run").await;
        if !in_background(&qemu).await {
            return;
        }

        // Nobody ever took the stream.
        let mut capture = qemu.capture(CaptureMode::Background).await.expect("it begins");
        capture.cancel().await.expect("it is given up");
        capture.cancel().await.expect("twice");
        drop(capture);
        assert_eq!(qemu.state(), RunState::Running);

        // Somebody reads on.
        let mut capture = qemu.capture(CaptureMode::Background).await.expect("it begins");
        let stream = collect(&mut capture);
        capture.point().await.expect("a point");
        capture.cancel().await.expect("it is given up");
        stream.join().expect("the stream");
        drop(capture);
        assert_eq!(qemu.state(), RunState::Running);

        // Somebody stops the guest, against the rules: whatever comes of it, nothing hangs and no wrong point is told.
        let mut events = qemu.events();
        let mut capture = qemu.capture(CaptureMode::Background).await.expect("it begins");
        let stream = collect(&mut capture);
        qemu.pause().await.expect("pause");
        match capture.point().await {
            Err(Error::Migration { .. }) => {}
            // The order came after the window.
            Ok(_) => capture.finished().await.expect("it completes"),
            Err(error) => panic!("{error}"),
        }
        stream.join().expect("the stream");
        while events.next().await.expect("an event").kind != EventKind::Migration(MigrationStatus::Active) {}
        drop(capture);
        qemu.resume().await.expect("resume");
        console.write(b"x").await.expect("typed");
        expect(&mut reader, "xA").await;

        // The worker dies in the middle, before the point and after it.
        let mut qemu = qemu;
        let _leash = Leash(qemu.identity());
        for letters in ["yB", "zC"] {
            let mut capture = qemu.capture(CaptureMode::Background).await.expect("it begins");
            drop(capture.reader());
            if letters == "zC" {
                capture.point().await.expect("a point");
            }
            let identity = qemu.identity();
            drop((capture, abandon(qemu)));
            qemu = Guard(Some(Qemu::adopt(identity, &launch.run_dir, &launch.log).await.expect("it is adopted")));
            qemu.attach_console(&console).expect("the serial port");
            console.write(&letters.as_bytes()[..1]).await.expect("typed");
            expect(&mut reader, letters).await;
            while !qemu.qmp().migration().await.expect("an answer").status.is_end() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(qemu.state(), RunState::Running);
        }

        let mut capture = qemu.capture(CaptureMode::Background).await.expect("the next one begins");
        let stream = collect(&mut capture);
        capture.point().await.expect("a point");
        capture.finished().await.expect("it completes");
        assert!(!stream.join().expect("the stream").is_empty());
    });
}

#[test]
fn a_capture_of_a_standing_guest_that_is_given_up() {
    with_each(|place| async move {
        let (qemu, console, mut reader) = start_guest(&place, "run").await;
        qemu.pause().await.expect("pause");
        let mut capture = qemu.capture(CaptureMode::Stopped).await.expect("it begins");
        drop(capture.reader());
        let error = capture.finished().await.expect_err("nobody reads");
        assert!(matches!(error, Error::Migration { how: "failed", .. }), "{error}");
        assert_eq!(qemu.state(), RunState::Paused);
        qemu.pause_anew().await.expect("an ordinary pause");

        let mut capture = qemu.capture(CaptureMode::Stopped).await.expect("it begins");
        let stalled = capture.reader();
        capture.cancel().await.expect("it is cancelled");
        drop(stalled);
        assert_eq!(qemu.state(), RunState::Paused);
        qemu.pause_anew().await.expect("an ordinary pause");

        let mut capture = qemu.capture(CaptureMode::Stopped).await.expect("it begins");
        let stream = collect(&mut capture);
        capture.finished().await.expect("it completes");
        stream.join().expect("the stream");
        qemu.resume().await.expect("resume");
        console.write(b"x").await.expect("typed");
        expect(&mut reader, "xA").await;
    });
}

#[test]
fn a_stream_that_cannot_be_loaded() {
    with_each(|place| async move {
        let qemu = start(&Launch { incoming: true, ..place.launch("run") }).await;
        let mut restore = qemu.restore(RestoreMode::Eager).await.expect("it accepts a stream");
        let mut writer = restore.writer();
        writer.write_all(b"no stream at all").expect("it is taken");
        drop(writer);
        let error = restore.loaded().await.expect_err("it is no stream");
        assert!(matches!(&error, Error::Exited { words, .. } if words.contains("migration stream")), "{error}");
    });
}

#[test]
fn a_running_process_is_adopted() {
    with_each(|place| async move {
        let launch = place.launch_guest("run");
        let (qemu, console, reader) = start_guest(&place, "run").await;
        let identity = qemu.identity();
        let _leash = Leash(identity);
        // As a worker's death would: every handle is gone, the process is not.
        drop((console, reader, abandon(qemu)));

        let qemu = Guard(Some(Qemu::adopt(identity, &launch.run_dir, &launch.log).await.expect("it is adopted")));
        assert_eq!(qemu.identity(), identity);
        assert_eq!(qemu.state(), RunState::Running);
        let console = place.console();
        let mut reader = console.reader();
        qemu.attach_console(&console).expect("the serial port");
        console.write(b"x").await.expect("typed");
        expect(&mut reader, "xA").await;
        qemu.pause().await.expect("pause");
        drop(abandon(qemu));

        let qemu = Guard(Some(Qemu::adopt(identity, &launch.run_dir, &launch.log).await.expect("again")));
        assert_eq!(qemu.state(), RunState::Paused);
        qemu.kill().await.expect("kill");
        let error = Qemu::adopt(identity, &launch.run_dir, &launch.log).await.expect_err("it is gone");
        assert!(matches!(error, Error::Gone { .. }), "{error}");
    });
}

#[test]
fn a_process_that_does_not_come_up() {
    with_each(|place| async move {
        let launch = Launch { cpu_model: "no-such-cpu".into(), ..place.launch("run") };
        let error = Qemu::start(&launch).await.expect_err("there is no such model");
        assert!(matches!(&error, Error::Exited { words, .. } if words.contains("no-such-cpu")), "{error}");
        assert!(error.to_string().contains("status 1"), "{error}");
        let error =
            Qemu::start(&Launch { binary: "/nowhere/qemu".into(), ..launch }).await.expect_err("no such program");
        assert!(error.to_string().contains("/nowhere/qemu"), "{error}");
        // An earlier end's words are not told again.
        let launch = Launch { binary: "/bin/true".into(), ..place.launch("run") };
        let error = Qemu::start(&launch).await.expect_err("no QEMU");
        assert!(matches!(&error, Error::Exited { words, .. } if words.is_empty()), "{error}");
    });
}

#[test]
fn a_start_that_is_given_up_leaves_no_process() {
    with_each(|place| async move {
        // A process that never comes up: it opens no monitor.
        let binary = place.path("slow");
        std::fs::write(&binary, "#!/bin/sh\necho $$ > pid\nexec sleep 1000\n").expect("a script");
        rustix::fs::chmod(&binary, rustix::fs::Mode::RWXU).expect("a script");
        let launch = Launch { binary, ..place.launch("run") };
        let pid_file = launch.run_dir.join("pid");
        let starting = tokio::spawn(async move { Qemu::start(&launch).await.map(drop) });
        let pid: i32 = loop {
            match std::fs::read_to_string(&pid_file).unwrap_or_default().strip_suffix('\n') {
                Some(pid) => break pid.parse().expect("a process id"),
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        starting.abort();
        assert!(starting.await.expect_err("it is given up").is_cancelled());
        // Dead, and reaped.
        while Path::new(&format!("/proc/{pid}")).exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
}

#[test]
fn the_screen() {
    with_each(|place| async move {
        let qemu = start(&place.launch("run")).await;
        qemu.resume().await.expect("resume");
        let file = place.path("screen.png");
        qemu.screendump(&file).await.expect("a picture");
        let png = std::fs::read(&file).expect("the picture");
        assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
        let error = qemu.screendump(Path::new("/nowhere/screen.png")).await.expect_err("no such folder");
        assert!(matches!(error, Error::Refused { .. }), "{error}");
        let screen = qemu.screen().await.expect("the screen");
        screen.readable().await.expect("it speaks");
        let mut greeting = [0; 12];
        assert_eq!(screen.try_read(&mut greeting).expect("it speaks"), 12);
        assert_eq!(&greeting, b"RFB 003.008\n");
    });
}

#[test]
fn ports_are_published_and_handed_over() {
    with_each(|place| async move {
        let nic = Some(Nic { mac: "52:54:00:12:34:56".into(), isolated: false });
        let first = start(&Launch { nic: nic.clone(), ..place.launch("first") }).await;
        let second = start(&Launch { nic, ..place.launch("second") }).await;
        // A port that is free now; nobody else takes it between this line and the next but by ill luck.
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its number").port();
        let ports = [Publish { address: Ipv4Addr::LOCALHOST, host: free, guest: 22 }];
        first.publish(&ports).await.expect("it is free");
        std::net::TcpStream::connect(("127.0.0.1", free)).expect("somebody listens");
        let error = second.publish(&ports).await.expect_err("it is taken");
        assert!(error.to_string().contains(&free.to_string()), "{error}");
        first.unpublish(&ports).await.expect("given back");
        first.unpublish(&ports).await.expect("twice is no error");
        second.publish(&ports).await.expect("it is free again");
    });
}

#[test]
fn a_run_folder_of_any_length() {
    with_each(|place| async move {
        let long = "a-rather-long-name".repeat(9);
        let (qemu, console, mut reader) = start_guest(&place, &long).await;
        console.write(b"x").await.expect("typed");
        expect(&mut reader, "xA").await;
        qemu.screen().await.expect("the screen");
    });
}

#[test]
fn an_outage_of_a_disk_stops_the_guest_and_is_survived() {
    with_each(|place| async move {
        let mut launch = place.launch("run");
        let (image, socket) = (place.path("disk0"), launch.run_dir.join("nbd.sock"));
        let mut content = vec![0; 1 << 20];
        content[..GUEST.len()].copy_from_slice(GUEST);
        content[510..512].copy_from_slice(b"\x55\xaa");
        std::fs::write(&image, content).expect("an image");
        let Some(server) = serve(&image, &socket, "disk0").await else { return };
        // The shortest there is: held for a second, then the request fails.
        let nbd = Nbd { socket: "nbd.sock".into(), export: "disk0".into(), reconnect_delay: Duration::from_secs(1) };
        launch.disks = vec![Disk { id: "disk0".into(), bus: Bus::Virtio, nbd }];
        let console = place.console();
        let mut reader = console.reader();
        let qemu = start(&launch).await;
        let mut events = qemu.events();
        qemu.resume().await.expect("resume");
        expect(&mut reader, "READY\n").await;

        drop(server);
        std::fs::remove_file(&socket).expect("the socket");
        qemu.reset().await.expect("reset");
        reach(&qemu, RunState::IoError).await;
        let node = loop {
            if let EventKind::BlockIoError { node, stops: true, .. } = events.next().await.expect("an event").kind {
                break node;
            }
        };
        assert_eq!(node, "disk0");

        let server = serve(&image, &socket, "disk0").await;
        assert!(server.is_some());
        // The client of an NBD server that came back takes its time to notice: the guest may be stopped again until then.
        let mut states = qemu.watch();
        qemu.resume().await.expect("resume");
        tokio::select! {
            _ = expect(&mut reader, "READY\n") => {}
            () = async {
                loop {
                    states.wait_for(|state| *state == RunState::IoError).await.expect("the watch lives");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    qemu.resume().await.expect("resume");
                }
            } => {}
        }
        assert_eq!(qemu.state(), RunState::Running);
    });
}

/// An NBD server of QEMU's own tools. Ends with the test.
struct Server(std::process::Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn serve(image: &Path, socket: &Path, export: &str) -> Option<Server> {
    let mut command = std::process::Command::new("qemu-nbd");
    command.args(["-t", "-f", "raw", "-x", export, "-k"]).arg(socket).arg(image);
    let Ok(child) = command.spawn() else {
        eprintln!("SKIPPED: there is no qemu-nbd");
        return None;
    };
    while !socket.exists() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Some(Server(child))
}

#[test]
fn disks_of_every_kind() {
    with_each(|place| async move {
        let mut launch = place.launch("run");
        let mut servers = vec![];
        for (id, bus) in [("disk0", Bus::Virtio), ("disk1", Bus::Ahci), ("disk2", Bus::Scsi), ("disk7", Bus::Virtio)] {
            let image = place.path(id);
            let mut content = vec![0; 1 << 20];
            if id == "disk0" {
                content[..GUEST.len()].copy_from_slice(GUEST);
                content[510..512].copy_from_slice(b"\x55\xaa");
            }
            std::fs::write(&image, content).expect("an image");
            let socket = format!("nbd-{id},1.sock");
            let Some(server) = serve(&image, &launch.run_dir.join(&socket), id).await else { return };
            servers.push(server);
            let nbd = Nbd { socket: socket.into(), export: id.into(), reconnect_delay: qemu::RECONNECT_DELAY };
            launch.disks.push(Disk { id: id.into(), bus, nbd });
        }
        let console = place.console();
        let mut reader = console.reader();
        let qemu = start(&launch).await;
        let nodes = qemu.qmp().block_nodes().await.expect("the nodes");
        let mut names: Vec<_> = nodes.iter().map(|node| (node.node_name.as_str(), node.image.virtual_size)).collect();
        names.sort_unstable();
        assert_eq!(names, [("disk0", 1 << 20), ("disk1", 1 << 20), ("disk2", 1 << 20), ("disk7", 1 << 20)]);
        // The first disk is what it boots from.
        qemu.attach_console(&console).expect("the serial port");
        qemu.resume().await.expect("resume");
        expect(&mut reader, "READY\n").await;

        // With all of them attached, the machine can be captured and comes back.
        qemu.pause().await.expect("pause");
        let mut capture = qemu.capture(CaptureMode::Stopped).await.expect("it begins");
        let stream = collect(&mut capture);
        capture.finished().await.expect("it completes");
        // It can go on with its disks all the same.
        qemu.resume().await.expect("resume");
        qemu.reset().await.expect("reset");
        expect(&mut reader, "READY\n").await;
        qemu.quit(PATIENCE).await.expect("quit");
        let copy = restore(launch, stream.join().expect("the stream")).await;
        copy.attach_console(&console).expect("the serial port");
        copy.resume().await.expect("resume");
        console.write(b"x").await.expect("typed");
        expect(&mut reader, "xA").await;
    });
}
