//! A machine's life without snapshots.

use e2e::{BASE, Lab, Witness, qemu_10, qemu_72, wait_for};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;

/// From nothing to a running guest and back, twice: what the guest flushed is there at the second boot.
fn a_life(qemu: PathBuf) {
    let lab = Lab::empty().on_qemu(qemu);
    lab.create_guest(BASE);
    assert_eq!(lab.state(BASE), "off");
    lab.ok(&["vm", "start", BASE]);
    assert_eq!(lab.state(BASE), "running");
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    let nonce = witness.wait_ready();
    witness.ask("set day Monday");
    witness.ask("write vdb 4M on the second disk");
    witness.prove();

    lab.ok(&["vm", "pause", BASE]);
    assert_eq!(lab.state(BASE), "paused");
    assert!(witness.try_ask("status", std::time::Duration::from_secs(1)).is_err(), "a paused guest does not answer");
    lab.ok(&["vm", "resume", BASE]);
    witness.resync();
    assert_eq!(witness.ask("get day")["value"], "Monday");

    lab.ok(&["vm", "save", BASE]);
    assert_eq!(lab.state(BASE), "saved");
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.resync();
    assert_eq!((witness.nonce(), witness.ask("get day")["value"].clone()), (nonce.clone(), Value::from("Monday")));
    let flushed = witness.prove()["flushed"].as_u64().expect("a number");

    lab.ok(&["vm", "stop", BASE]);
    assert_eq!(lab.state(BASE), "off");
    lab.ok(&["vm", "stop", BASE]);
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    let status = witness.resync();
    assert_ne!(status["nonce"], nonce.as_str());
    assert!(status["journal"]["found"]["seq"].as_u64().expect("a number") >= flushed, "{status}");
    assert_eq!(witness.ask("read vdb 4M")["text"], "on the second disk");
    witness.prove();

    lab.ok(&["vm", "restart", BASE]);
    wait_for("another boot", || (witness.resync()["nonce"] != status["nonce"]).then_some(()));
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    assert_eq!(lab.state(BASE), "off");
    lab.ok(&["vm", "delete", BASE, "--yes"]);
    assert_eq!(lab.json(&["vm", "list"])["vms"], Value::Array(Vec::new()));
}

#[test]
fn on_qemu_7_2() {
    a_life(qemu_72());
}

#[test]
fn on_qemu_10_0() {
    a_life(qemu_10());
}

#[test]
fn a_published_port_leads_into_the_guest() {
    let lab = Lab::with_base();
    let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    lab.ok(&["vm", "set", BASE, "--publish", &format!("{port}:7777")]);
    lab.ok(&["vm", "start", BASE]);
    let nonce = lab.witness(BASE).resync()["nonce"].clone();
    // The guest listens a moment after it is up; until then QEMU takes the connection and drops it.
    let heard = wait_for("an answer over the network", || ask_over_tcp(port));
    assert_eq!(heard["nonce"], nonce);

    // It stays open over a pause, over a new worker, and over an apply to another QEMU.
    lab.snapshot("Monday");
    for worker_dies in [false, true] {
        lab.ok(&["vm", "pause", BASE]);
        if worker_dies {
            lab.kill_worker();
        }
        lab.ok(&["vm", "resume", BASE]);
        assert_eq!(wait_for("an answer after a pause", || ask_over_tcp(port))["nonce"], nonce);
    }
    lab.ok(&["snapshot", "apply", BASE, "Monday", "--discard"]);
    assert_eq!(wait_for("an answer after an apply", || ask_over_tcp(port))["nonce"], nonce);
}

fn ask_over_tcp(port: u16) -> Option<Value> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).ok()?;
    stream.write_all(b">1 status\n").ok()?;
    let mut heard = String::new();
    let mut bytes = [0; 1024];
    while !heard.trim_start().contains('\n') {
        let count = stream.read(&mut bytes).ok().filter(|count| *count > 0)?;
        heard.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    serde_json::from_str(heard.trim().strip_prefix("<1 ")?).ok()
}

/// What the port printed before anybody listened is heard first; two may listen.
#[test]
fn the_console_remembers() {
    let (lab, mut first) = Lab::running();
    first.ask("set day Monday");
    let mut second = lab.witness(BASE);
    second.wait_ready();
    assert_eq!(first.nonce(), second_hears(&mut first, &mut second));
}

/// One types; the other hears the answer, too. Gives the nonce that it heard.
fn second_hears(first: &mut Witness, second: &mut Witness) -> String {
    let nonce = first.nonce();
    second.hear(&nonce);
    nonce
}

/// Processes that the machine needs end with it.
#[test]
fn nothing_runs_for_a_machine_that_is_off() {
    let (lab, witness) = Lab::running();
    assert!(lab.worker().is_some());
    drop(witness);
    lab.ok(&["vm", "stop", BASE, "--turn-off"]);
    wait_for("the worker to leave", || lab.processes().is_empty().then_some(()));
}
