//! What a snapshot's memory holds.

use e2e::{BASE, Lab, Witness, qemu_10, qemu_72};
use serde_json::Value;

/// Pages in a MiB.
const PAGES: u64 = 256;

/// Pages that the guest itself changes between two snapshots, beside those that it is told to: stacks, page tables, the journal's.
const OWN: u64 = 4 * PAGES;

/// What a snapshot's memory occupies beside its pages, bytes: the file's own tables, the state of the devices.
const BESIDE: u64 = 8 << 20;

/// RAM of the guest of many snapshots, MiB: 256, or as many as `TENBY_TEST_RAM` says, for a large one by hand.
fn ram() -> u64 {
    std::env::var("TENBY_TEST_RAM").map_or(256, |mib| mib.parse().expect("TENBY_TEST_RAM is a number of MiB"))
}

/// What fills the guest's RAM, as it should be.
fn sum(witness: &mut Witness) -> Value {
    let sum = witness.ask("sum-ram");
    assert_eq!(sum["ok"], true, "{sum}");
    sum["sum"].clone()
}

/// The numbers below `count` in an order that is always the same, and none that anybody would choose.
fn shuffled(count: u64) -> Vec<u64> {
    let mut numbers: Vec<u64> = (0..count).collect();
    numbers.sort_by_key(|number| (number + 20_261_127).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    numbers
}

/// So many snapshots in a row, before each of which a part of RAM is filled anew; then each is applied, and the guest proves its RAM.
fn in_a_row(lab: &Lab, count: u64) {
    let (filled, part) = (ram() / 4, ram() / 64);
    lab.create_guest_with(BASE, &format!("{}M", ram()));
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    witness.wait_ready();
    witness.ask(&format!("fill-ram {filled} 1"));
    let mut sums = Vec::new();
    for number in 0..count {
        if number > 0 {
            let at = number * part % filled;
            witness.ask(&format!("refill-ram {at} {part} {}", number + 1));
        }
        sums.push(sum(&mut witness));
        lab.snapshot(&number.to_string());
    }
    assert_only_what_changed(lab, part * PAGES);

    for number in shuffled(count) {
        lab.ok(&["snapshot", "apply", BASE, &number.to_string(), "--discard"]);
        witness.resync();
        assert_eq!(sum(&mut witness), sums[number as usize], "what {number} holds");
        witness.prove();
    }
    lab.settle();
    lab.assert_tidy();
}

/// Every snapshot but the first holds the pages that were filled anew, and few others.
fn assert_only_what_changed(lab: &Lab, refilled: u64) {
    let tree = lab.tree();
    for snapshot in &tree["snapshots"].as_array().expect("a list")[1..] {
        let stored = snapshot["pages"]["stored"].as_u64().expect("a number");
        let bytes = snapshot["memory_bytes"].as_u64().expect("a number");
        println!("{}: {stored} pages, {bytes} bytes, {} ms", snapshot["name"], snapshot["pause_ms"]);
        assert!((refilled..=refilled + OWN).contains(&stored), "{refilled} pages were changed: {snapshot}");
        assert!(bytes <= stored * 4096 + BESIDE, "{snapshot}");
    }
}

#[test]
fn twelve_in_a_row_on_qemu_7_2() {
    in_a_row(&Lab::empty().on_qemu(qemu_72()), 12);
}

#[test]
fn twelve_in_a_row_on_qemu_10_0() {
    in_a_row(&Lab::empty().on_qemu(qemu_10()), 12);
}

/// It takes longer where QEMU cannot track memory, and `doctor` says so.
#[test]
fn four_in_a_row_of_an_ordinary_user() {
    let lab = Lab::empty().for_ordinary_users();
    in_a_row(&lab, 4);
    let found = lab.json(&["doctor"]);
    let userfaultfd = found["checks"].as_array().expect("a list").iter().find(|check| check["what"] == "userfaultfd");
    let userfaultfd = userfaultfd.unwrap_or_else(|| panic!("{found}"));
    assert_eq!(userfaultfd["ok"], false, "{found}");
    let cost = userfaultfd["cost"].as_str().expect("a cost");
    assert!(cost.contains("more than once") && cost.contains("until its memory is read"), "{cost}");
}
