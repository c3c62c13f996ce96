//! The server against the clients that people use. A client that is not installed here is skipped, loudly: the project's own
//! runner installs them all (qemu-utils, libnbd-bin, fio).

mod support;

use export::{Export, Options, listen_unix};
use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use support::{Served, disk, options};

const MIB: u64 = 1 << 20;

/// Whether a program is there; if not, the test that asks is not worth its name.
fn has(program: &str) -> bool {
    let there = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !there {
        // Past the test's captured output, which nobody sees when it passes.
        let _shown = writeln!(std::io::stderr().lock(), "SKIPPED: {program} is not installed");
    }
    there
}

/// Runs a program to its success; says what it printed.
fn run(program: &str, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().expect("it starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// Data and holes of all sizes, the same every time.
fn speckled(len: usize) -> Vec<u8> {
    let mut content = vec![0; len];
    let (mut at, mut state) = (0, 1u64);
    while at < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let run = (512 << (state >> 60)).min(len - at);
        if state >> 59 & 1 == 1 {
            content[at..at + run].fill((state >> 40) as u8 | 1);
        }
        at += run;
    }
    content
}

#[test]
fn qemu_img_reads_and_writes() {
    if !has("qemu-img") {
        return;
    }
    let served = Served::new(64 * MIB);
    let (source, back, uri) = (served.file("source"), served.file("back"), served.uri());
    std::fs::write(&source, speckled(64 << 20)).expect("written");

    let info = run("qemu-img", ["info", "--output=json", &uri]);
    assert!(info.contains("\"virtual-size\": 67108864"), "{info}");

    run("qemu-img", ["convert", "-n", "-f", "raw", "-O", "raw", source.to_str().expect("ASCII"), &uri]);
    assert!(served.content() == speckled(64 << 20));
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", source.to_str().expect("ASCII"), &uri]);
    run("qemu-img", ["convert", "-f", "raw", "-O", "raw", &uri, back.to_str().expect("ASCII")]);
    assert!(std::fs::read(back).expect("written") == speckled(64 << 20));
}

#[test]
fn qemu_img_sees_holes() {
    if !has("qemu-img") {
        return;
    }
    let served = Served::new(64 * MIB);
    served.chain.write(&vec![1; 1 << 20], 8 * MIB).expect("written");
    let map = run("qemu-img", ["map", "-f", "raw", "--output=json", &served.uri()]);
    let expected = [
        r#"{ "start": 0, "length": 8388608, "depth": 0, "present": false, "zero": true, "data": false,"#,
        r#"{ "start": 8388608, "length": 1048576, "depth": 0, "present": true, "zero": false, "data": true,"#,
        r#"{ "start": 9437184, "length": 57671680, "depth": 0, "present": false, "zero": true, "data": false,"#,
    ];
    let lines: Vec<_> = map.lines().map(|line| line.trim_start_matches('[')).collect();
    assert_eq!(lines.len(), expected.len(), "{map}");
    for (line, expected) in lines.iter().zip(expected) {
        // Older ones do not say "compressed" and the like.
        let without = |text: &str| text.replace(" \"present\": false,", "").replace(" \"present\": true,", "");
        assert!(without(line).starts_with(&without(expected)), "{map}");
    }
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes() {
    if !has("qemu-io") {
        return;
    }
    let served = Served::new(16 * MIB);
    let commands = [
        "write -P 1 0 4M",
        "write -f -P 2 1M 64k",
        "write -z 2M 64k",
        "write -z -u 3M 64k",
        "discard 512k 512k",
        "flush",
        "read -P 1 0 512k",
        "read -P 0 512k 512k",
        "read -P 2 1M 64k",
        "read -P 0 2M 64k",
        "read -P 0 3M 64k",
        "aio_write -P 4 8M 2M",
        "aio_write -P 5 10M 2M",
        "aio_write -P 6 12M 512",
        "aio_flush",
        "read -P 4 8M 2M",
        "read -P 5 10M 2M",
        "read -P 6 12M 512",
    ];
    let uri = served.uri();
    let args = commands.iter().flat_map(|command| ["-c", command]).chain(["-f", "raw", &uri]);
    let out = run("qemu-io", args);
    assert!(!out.contains("failed") && !out.contains("error"), "{out}");
    assert_eq!(served.content()[12 << 20..(12 << 20) + 513], [[6; 512].as_slice(), &[0]].concat());
}

#[test]
fn qemu_nbd_lists_the_export() {
    if !has("qemu-nbd") {
        return;
    }
    let served = Served::with(disk(MIB), Options { name: "system disk".into(), ..options() });
    let socket = served.socket.to_str().expect("ASCII").to_owned();
    let list = run("qemu-nbd", ["--list", "-k", &socket]);
    for expected in [
        "exports available: 1",
        "'system disk'",
        "size:  1048576",
        "min block: 512",
        "max block: 33554432",
        "base:allocation",
    ] {
        assert!(list.contains(expected), "{expected}: {list}");
    }
    let (_, flags) = list.split_once("flags:").expect("flags");
    for flag in ["flush", "fua", "trim", "zeroes", "multi", "fast-zero"] {
        assert!(flags.contains(flag), "{flag}: {list}");
    }
}

#[test]
fn qemu_io_waits_for_a_server_that_comes_back() {
    if !has("qemu-io") {
        return;
    }
    let served = Served::new(16 * MIB);
    let image = format!(
        "json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"nbd\",\"reconnect-delay\":60,\"server\":{{\"type\":\"unix\",\"path\":\"{}\"}}}}}}",
        served.socket.display()
    );
    // Line by line: it would keep its answers until its end.
    let mut client = Command::new("stdbuf")
        .args(["-oL", "qemu-io", &image])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut commands = client.stdin.take().expect("a pipe");
    let mut replies = std::io::BufRead::lines(std::io::BufReader::new(client.stdout.take().expect("a pipe")));
    let mut say = |command: &str| {
        commands.write_all(command.as_bytes()).expect("it reads");
    };
    let mut hear = |expected: &str| {
        let line = replies.by_ref().map(|line| line.expect("text")).find(|line| line.contains(expected));
        assert!(line.is_some(), "{expected}");
    };

    say("write -P 1 0 1M\n");
    hear("wrote 1048576/1048576 bytes at offset 0");
    served.export.drop_connections();
    say("write -P 2 1M 1M\n");
    hear("wrote 1048576/1048576 bytes at offset 1048576");

    served.export.stop();
    // It finds nobody at first, and keeps the request.
    say("write -P 3 2M 1M\n");
    let listener = listen_unix(&served.socket).expect("the name is stale");
    let second = Export::serve(Arc::clone(&served.chain), listener, options()).expect("threads");
    hear("wrote 1048576/1048576 bytes at offset 2097152");
    say("read -P 2 1M 1M\n");
    hear("read 1048576/1048576 bytes at offset 1048576");
    say("quit\n");
    assert!(client.wait().expect("it ends").success());
    second.stop();
    let expected: Vec<u8> = (1..4).flat_map(|byte| vec![byte; 1 << 20]).collect();
    assert!(served.content()[..3 << 20] == expected);
}

#[test]
fn libnbd_copies_over_many_connections_and_maps() {
    if !has("nbdcopy") || !has("nbdinfo") {
        return;
    }
    let served = Served::new(64 * MIB);
    let (source, back, uri) = (served.file("source"), served.file("back"), served.uri());
    std::fs::write(&source, speckled(64 << 20)).expect("written");
    run("nbdcopy", ["--connections=4", "--flush", source.to_str().expect("ASCII"), &uri]);
    assert!(served.content() == speckled(64 << 20));
    run("nbdcopy", ["--connections=4", "--requests=64", &uri, back.to_str().expect("ASCII")]);
    assert!(std::fs::read(back).expect("written") == speckled(64 << 20));

    let info = run("nbdinfo", ["--json", &uri]);
    for expected in [
        "\"export-size\": 67108864",
        "\"can_multi_conn\": true",
        "\"can_fua\": true",
        "\"base:allocation\"",
        "\"block_size_maximum\": 33554432",
    ] {
        assert!(info.contains(expected), "{expected}: {info}");
    }

    let empty = Served::new(8 * MIB);
    empty.chain.write(&vec![1; 65536], 0).expect("written");
    let map: Vec<Vec<String>> = run("nbdinfo", ["--map", &empty.uri()])
        .lines()
        .map(|line| line.split_whitespace().map(Into::into).collect())
        .collect();
    assert_eq!(map, [vec!["0", "65536", "0", "data"], vec!["65536", "8323072", "3", "hole,zero"]]);
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !has("fio") {
        return;
    }
    if !run("fio", ["--enghelp"]).contains("nbd") {
        eprintln!("SKIPPED: this fio has no nbd engine");
        return;
    }
    let served = Served::new(32 * MIB);
    let uri = format!("--uri={}", served.uri());
    let common = ["--ioengine=nbd", &uri, "--size=32m", "--group_reporting", "--randrepeat=1"];
    let verify = [
        "--name=verify",
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        // Nothing is left in the tree.
        "--verify_state_save=0",
    ];
    run("fio", common.iter().chain(&verify));
    let mixed = ["--name=mixed", "--rw=randrw", "--bs=4k", "--iodepth=16", "--numjobs=3", "--io_size=8m", "--fsync=32"];
    run("fio", common.iter().chain(&mixed));
}
