//! For `cargo xtask bench memory`: what a guest notices of its snapshots and applies, with Tenby or with QEMU's own. Prints JSON.
//!
//! `memory tenby MIB` and `memory qemu MIB`: a guest of so many MiB, of which it fills the half; `memory hundred MIB`: one snapshot of it applied a
//! hundred times; `memory busy MIB`: snapshots of one that keeps changing its RAM; `memory clones MIB`: 25 machines that go on from one.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use e2e::{Lab, Witness, guest, wait_for};
use serde_json::{Value, json};

/// Snapshots that are taken one after the other.
const SNAPSHOTS: usize = 10;
/// How often one is applied.
const APPLIES: usize = 5;
/// Snapshots of a guest that changes so many pages a second, within so many MiB.
const BUSY: usize = 40;
const DIRTY: &str = "dirty 64 2000";
/// Clones that are started together.
const CLONES: usize = 25;
/// How often a guest is saved, and how often QEMU does each of what it can do instead.
const SAVES: usize = 3;
/// The guest does what it likes in between.
const BETWEEN: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [peer, mib] = &words[..] else { bail!("memory tenby|qemu|hundred|busy|clones MIB") };
    let told = match peer.as_str() {
        "tenby" => tenby(mib)?,
        "qemu" => qemu(mib)?,
        "hundred" => hundred(mib)?,
        "busy" => busy(mib)?,
        "clones" => clones(mib)?,
        other => bail!("{other}: tenby, qemu, hundred, busy or clones"),
    };
    println!("{told}");
    Ok(())
}

/// Half of its RAM is a pattern.
fn fill(witness: &mut Witness, mib: &str) -> Result<()> {
    let half = mib.parse::<u64>()? / 2;
    witness.ask(&format!("fill-ram {half} 7"));
    witness.ask("journal pause");
    Ok(())
}

/// The pattern is there. (It is looked at after the time was taken: that is when all of it is needed.)
fn prove(witness: &mut Witness) {
    assert_eq!(witness.ask("sum-ram")["ok"], true);
}

/// A guest of so many MiB, up and filled.
fn big(mib: &str) -> Result<(Lab, Witness)> {
    let (lab, guest) = (Lab::empty(), guest());
    let (kernel, initrd) = (guest.kernel.to_string_lossy(), guest.initrd.to_string_lossy());
    let (memory, append) = (format!("{mib}M"), guest.append.trim());
    let hardware = ["--memory", &memory, "--accel", "tcg", "--disk", "new:64M", "--disk", "new:64M"];
    let files = ["--kernel", &kernel, "--initrd", &initrd, "--append", append];
    lab.ok(&[&["vm", "create", "big"], &hardware[..], &files[..]].concat());
    lab.ok(&["vm", "start", "big"]);
    let mut witness = lab.witness("big");
    witness.wait_ready();
    fill(&mut witness, mib)?;
    Ok((lab, witness))
}

/// One snapshot applied a hundred times.
fn hundred(mib: &str) -> Result<Value> {
    let (lab, mut witness) = big(mib)?;
    lab.ok(&["snapshot", "create", "big", "it"]);
    let worker = lab.json(&["vm", "show", "big"])["worker"].as_i64().context("a worker")?;
    let memory = || -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{worker}/status"))?;
        let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
        Ok(most.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    };
    let descriptors = || -> Result<usize> { Ok(std::fs::read_dir(format!("/proc/{worker}/fd"))?.count()) };
    let (mut applied, mut held) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        let start = Instant::now();
        lab.ok(&["snapshot", "apply", "big", "it", "--discard"]);
        witness.ask("status");
        applied.push(start.elapsed().as_secs_f64());
        held.push(descriptors()?);
    }
    prove(&mut witness);
    let told = json!({ "applied_s": applied, "descriptors": held, "worker_mib": memory()? });
    lab.ok(&["vm", "stop", "big", "--turn-off"]);
    Ok(told)
}

/// Snapshots of a guest that keeps changing its RAM: its pauses, and how long it was without a tick of its own clock, beside as long a time
/// without a snapshot.
fn busy(mib: &str) -> Result<Value> {
    let (lab, mut witness) = big(mib)?;
    witness.ask(DIRTY);
    let mut gap = || -> Result<f64> { Ok(witness.ask("gap")["gap_us"].as_f64().context("gap_us")? / 1e3) };
    let (mut pauses, mut with, mut without) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..BUSY {
        std::thread::sleep(BETWEEN);
        let name = number.to_string();
        gap()?;
        let start = Instant::now();
        lab.ok(&["snapshot", "create", "big", &name]);
        with.push(gap()?);
        let took = start.elapsed();
        pauses.push(lab.json(&["snapshot", "show", "big", &name])["pause_ms"].clone());
        std::thread::sleep(BETWEEN);
        gap()?;
        std::thread::sleep(took);
        without.push(gap()?);
    }
    lab.ok(&["vm", "stop", "big", "--turn-off"]);
    Ok(json!({ "pauses_ms": pauses, "gaps_ms": with, "idle_gaps_ms": without }))
}

/// Linked clones that go on from one memory, started together: when each has answered, and what they cost the host.
fn clones(mib: &str) -> Result<Value> {
    let (lab, mut witness) = big(mib)?;
    lab.ok(&["snapshot", "create", "big", "warm"]);
    let nonce = witness.nonce();
    lab.ok(&["vm", "stop", "big", "--turn-off"]);
    let used = lab.json(&["snapshot", "show", "big", "warm"])["pages"]["stored"].as_f64().context("pages")? / 256.0;
    let start = Instant::now();
    let count = CLONES.to_string();
    let clones: Vec<String> = (1..=CLONES).map(|number| format!("big-{number}")).collect();
    lab.ok(&["vm", "create", "big", "--from", "big@warm", "--count", &count, "--start"]);
    // All at the same time: one after the other, who asks would be what is waited for.
    let answers = |name: &String| {
        assert_eq!(lab.witness(name).resync()["nonce"], nonce.as_str());
        start.elapsed().as_secs_f64()
    };
    let answered: Vec<f64> = std::thread::scope(|scope| {
        let asking: Vec<_> = clones.iter().map(|name| scope.spawn(move || answers(name))).collect();
        asking.into_iter().map(|answer| answer.join().expect("it answers")).collect()
    });
    wait_for("all memory to arrive", || {
        let arrived = |name: &String| lab.json(&["vm", "ledger", name])["machine"]["now"]["restoring"].is_null();
        clones.iter().all(arrived).then_some(())
    });
    std::thread::sleep(BETWEEN);
    let mut all = 0.0;
    for name in &clones {
        let worker = lab.json(&["vm", "show", name])["worker"].as_i64().context("a worker")?;
        let qemu = lab.json(&["vm", "ledger", name])["machine"]["now"]["run"]["pid"].as_i64().context("a QEMU")?;
        all += held(worker)? + held(qemu)?;
    }
    let each = all / CLONES as f64;
    let own = |name: &String| lab.json(&["vm", "show", name])["disk_bytes"].as_f64().unwrap_or_default();
    let disks: Vec<f64> = clones.iter().map(own).collect();
    for name in &clones {
        lab.ok(&["vm", "stop", name, "--turn-off"]);
    }
    Ok(json!({ "answered_s": answered, "used_mib": used, "host_mib": each, "disk_bytes": disks }))
}

/// RAM that a process costs the host, MiB: its own, its share of what it has in common with others, and the tables that say where all that is.
fn held(pid: i64) -> Result<f64> {
    let kib = |file: &str, key: &str| -> Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/{file}"))?;
        let line =
            text.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("no {key} in {text}"))?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    };
    Ok((kib("smaps_rollup", "Pss:")? + kib("status", "VmPTE:")?) / 1024.0)
}

fn tenby(mib: &str) -> Result<Value> {
    let (lab, mut witness) = big(mib)?;
    let (mut pauses, mut stored) = (Vec::new(), Vec::new());
    for number in 0..SNAPSHOTS {
        std::thread::sleep(BETWEEN);
        let name = number.to_string();
        lab.ok(&["snapshot", "create", "big", &name]);
        let told = lab.json(&["snapshot", "show", "big", &name]);
        pauses.push(told["pause_ms"].clone());
        stored.push(told["pages"]["stored"].clone());
    }
    let (mut applied, mut saved, mut resumed) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..APPLIES {
        let name = (number * 2).to_string();
        let start = Instant::now();
        lab.ok(&["snapshot", "apply", "big", &name, "--discard"]);
        witness.ask("status");
        applied.push(start.elapsed().as_secs_f64());
        prove(&mut witness);
    }
    for _ in 0..SAVES {
        std::thread::sleep(BETWEEN);
        let start = Instant::now();
        lab.ok(&["vm", "save", "big"]);
        saved.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        lab.ok(&["vm", "start", "big"]);
        // A console ends with its guest.
        witness = lab.witness("big");
        witness.resync();
        resumed.push(start.elapsed().as_secs_f64());
        prove(&mut witness);
    }
    lab.ok(&["vm", "stop", "big", "--turn-off"]);
    Ok(json!({
        "pauses_ms": pauses, "stored_pages": stored, "applied_s": applied, "saved_s": saved, "resumed_s": resumed,
    }))
}

/// A QEMU with the same guest on qcow2, killed when dropped.
struct Plain {
    child: Child,
    monitor: BufReader<UnixStream>,
    folder: tempfile::TempDir,
}

impl Plain {
    fn boot(mib: &str) -> Result<(Self, Witness)> {
        let folder = tempfile::Builder::new().prefix("te-").tempdir_in("/tmp")?;
        for disk in ["vda", "vdb"] {
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", "qcow2"]).arg(folder.path().join(disk)).arg("64M");
            create.status()?.success().then_some(()).context("qemu-img")?;
        }
        let guest = guest();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-machine", "q35,accel=tcg", "-cpu", "Nehalem", "-m", mib, "-nodefaults", "-no-user-config"]);
        command.args(["-display", "none", "-append", &guest.append]).arg("-kernel").arg(guest.kernel);
        command.arg("-initrd").arg(guest.initrd);
        command.args(["-serial", "unix:serial,server=on,wait=on", "-qmp", "unix:qmp,server=on,wait=off"]);
        for disk in ["vda", "vdb"] {
            command.args(["-drive", &format!("file={disk},format=qcow2,if=virtio")]);
        }
        let child = command.current_dir(folder.path()).stdin(Stdio::null()).spawn()?;
        let connect = |name: &str| wait_for("QEMU to listen", || UnixStream::connect(folder.path().join(name)).ok());
        let serial = connect("serial");
        let mut witness = Witness::new(serial.try_clone()?, serial, None);
        witness.wait_ready();
        let mut plain = Self { child, monitor: BufReader::new(connect("qmp")), folder };
        plain.answer()?;
        plain.execute(&json!({ "execute": "qmp_capabilities" }))?;
        Ok((plain, witness))
    }

    fn execute(&mut self, command: &Value) -> Result<Value> {
        self.monitor.get_mut().write_all(format!("{command}\n").as_bytes())?;
        loop {
            let answer = self.answer()?;
            if answer.get("event").is_none() {
                return Ok(answer);
            }
        }
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.monitor.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// An order for people; how long it took, seconds. The guest stands still meanwhile.
    fn human(&mut self, order: &str) -> Result<f64> {
        let start = Instant::now();
        let arguments = json!({ "command-line": order });
        let answer = self.execute(&json!({ "execute": "human-monitor-command", "arguments": arguments }))?;
        if answer["return"] != "" {
            bail!("{order}: {answer}");
        }
        Ok(start.elapsed().as_secs_f64())
    }

    /// All of its memory goes into the file `memory`; how long it took, seconds. The guest stands still meanwhile.
    fn copy_memory(&mut self) -> Result<f64> {
        let start = Instant::now();
        self.human("stop")?;
        self.execute(&json!({ "execute": "migrate", "arguments": { "uri": "exec:cat > memory" } }))?;
        loop {
            let told = self.execute(&json!({ "execute": "query-migrate" }))?;
            match told["return"]["status"].as_str() {
                Some("completed") => break,
                Some("failed") | None => bail!("copying its memory: {told}"),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        self.human("cont")?;
        Ok(start.elapsed().as_secs_f64())
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn qemu(mib: &str) -> Result<Value> {
    let (mut plain, mut witness) = Plain::boot(mib)?;
    fill(&mut witness, mib)?;
    let (mut pauses, mut applied, mut copied) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..SAVES {
        std::thread::sleep(BETWEEN);
        pauses.push(plain.human(&format!("savevm s{number}"))? * 1e3);
    }
    // Nobody is on the way whom it must leave room.
    plain.human("migrate_set_parameter max-bandwidth 100G")?;
    for _ in 0..SAVES {
        std::thread::sleep(BETWEEN);
        copied.push(plain.copy_memory()?);
        std::fs::remove_file(plain.folder.path().join("memory"))?;
    }
    for number in 0..SAVES {
        let start = Instant::now();
        plain.human(&format!("loadvm s{number}"))?;
        witness.ask("status");
        applied.push(start.elapsed().as_secs_f64());
        prove(&mut witness);
    }
    Ok(json!({ "pauses_ms": pauses, "applied_s": applied, "copied_s": copied }))
}
