//! The test guest itself, in a plain QEMU: what other tests take for granted of it.

use e2e::{Bare, qemu_10, qemu_72};
use std::path::Path;

/// Works, survives a power cut with nothing lost that it called flushed, and heeds its power button.
fn lives(qemu: &Path) {
    let mut machine = Bare::boot(qemu);
    let mut witness = machine.witness();
    let nonce = witness.wait_ready();
    assert_eq!(witness.nonce(), nonce);

    witness.ask("set day Monday");
    assert_eq!(witness.ask("get day")["value"], "Monday");
    witness.ask("write vda 3000001 here I was");
    assert_eq!(witness.ask("read vda 3000001")["text"], "here I was");
    witness.ask("fill-ram 8 42");
    assert_eq!(witness.ask("sum-ram")["ok"], true);
    witness.ask("fill-disk vdb 4M 2 7");
    assert_eq!(witness.ask("sum-disk vdb 4M 2 7")["ok"], true);
    witness.ask("zero vdb 5M 1");
    assert_eq!(witness.ask("sum-disk vdb 4M 2 7")["wrong_at"], 5 << 20);
    witness.ask("journal pause");
    let flushed = witness.ask("journal step 11")["flushed"].as_u64().expect("a number");
    assert!(flushed >= 11);
    witness.prove();

    machine.cut_power(qemu);
    let mut witness = machine.witness();
    assert_ne!(witness.wait_ready(), nonce, "each boot draws its own");
    let found = witness.ask("status")["journal"]["found"].clone();
    assert_eq!(found["seq"], flushed, "{found}");
    assert_eq!(found["nonce"], nonce.as_str());
    assert_eq!(witness.ask("get day")["value"], serde_json::Value::Null, "that was in RAM");
    assert_eq!(witness.ask("read vda 3000001")["text"], "here I was");
    witness.prove();

    machine.press_power_button();
}

#[test]
fn on_qemu_7_2() {
    lives(&qemu_72());
}

#[test]
fn on_qemu_10_0() {
    lives(&qemu_10());
}

/// The witness would be worth nothing if it never found anything.
#[test]
fn a_lie_is_found_out() {
    let machine = Bare::boot(&qemu_10());
    let mut witness = machine.witness();
    witness.wait_ready();
    witness.ask("journal pause");
    witness.ask("journal step 4");
    witness.prove();
    // Slot 1 of vda: a record that RAM knows to be there.
    witness.ask("write vda 1052672 something else");
    let answer = witness.ask("check");
    assert_eq!(answer["ok"], false, "{answer}");
}
