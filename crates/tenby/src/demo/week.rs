//! Monday to Friday in the life of a virtual machine: the story that Hyper-V's snapshots were first explained with.

use super::guest::Guest;
use super::{NAME, Stage};
use machine::request::Problem;
use machine::tree::LayerFormat;
use std::path::Path;
use std::time::Instant;

/// What the guest did on a day, and can be held to: what its RAM and its disks must say after that day's snapshot was applied.
#[derive(Debug, Clone, Copy)]
struct Day {
    name: &'static str,
    seed: u32,
}

const MONDAY: Day = Day { name: "Monday", seed: 1 };
const TUESDAY: Day = Day { name: "Tuesday", seed: 2 };
const WEDNESDAY: Day = Day { name: "Wednesday", seed: 3 };
const AFTERNOON: Day = Day { name: "afternoon", seed: 6 };
const THURSDAY: Day = Day { name: "Thursday", seed: 4 };
const FRIDAY: Day = Day { name: "Friday", seed: 5 };

/// The four commands that bring up a machine of one's own. The README has the same.
pub(crate) const YOUR_OWN: [&str; 4] = [
    "tenby vm create web --memory 2G --cpus 2 --disk new:20G --cdrom debian.iso --boot cdrom",
    "tenby vm start web",
    "tenby vm console web",
    "tenby snapshot create web fresh",
];

/// Tells the story.
pub(crate) async fn tell(root: Option<&Path>, format: LayerFormat) -> Result<(), Problem> {
    let began = Instant::now();
    let mut stage = Stage::set(root).await?;
    let mut proofs = Vec::new();
    begin(&mut stage, format).await?;
    monday(&mut stage).await?;
    tuesday(&mut stage).await?;
    wednesday(&mut stage, &mut proofs).await?;
    thursday(&mut stage).await?;
    friday(&mut stage).await?;
    every_one(&mut stage, &mut proofs).await?;
    clean_up(&mut stage).await?;
    end(&stage, &proofs, began).await
}

async fn begin(stage: &mut Stage, format: LayerFormat) -> Result<(), Problem> {
    stage.say("A week in the life of a virtual machine. All of it is real: guest, disks, memory.");
    stage.say("The only program in the guest is a witness: it remembers things in RAM and on two");
    stage.say("disks, and can be asked whether they agree. (Below: the files of the first disk.)");
    stage.say(&format!("\n$ export TENBY_ROOT={}", stage.session.root.path().display()));
    let (kernel, initrd) = (stage.guest.kernel.display().to_string(), stage.guest.initrd.display().to_string());
    let append = stage.guest.append.clone();
    let said = if format == LayerFormat::default() { String::new() } else { format!(",format={format}") };
    let disks = ["1G", "256M"].map(|size| format!("new:{size}{said}"));
    let words = ["vm", "create", NAME, "--memory", "512M", "--disk", &disks[0], "--disk", &disks[1]];
    let boot = ["--kernel", &kernel, "--initrd", &initrd, "--append", &append];
    stage.tenby(&[&words[..], &boot].concat()).await?;
    stage.tenby(&["vm", "start", NAME]).await?;
    stage.say("(the guest boots)");
    stage.talk().await?.wait_ready().await
}

async fn monday(stage: &mut Stage) -> Result<(), Problem> {
    stage.day("Monday");
    stage.say("The machine runs on its VHD and has never been snapped.");
    live(stage, MONDAY).await?;
    stage.show().await?;
    stage.say("\nIn the evening it is snapped, as it runs. From now on the VHD is not written any");
    stage.say("more; a new differencing disk, AVHD-1, takes what changes. The memory is kept, too.");
    stage.tenby(&["snapshot", "create", NAME, "Monday"]).await?;
    stage.show().await
}

async fn tuesday(stage: &mut Stage) -> Result<(), Problem> {
    stage.day("Tuesday");
    stage.say("The guest goes on; what it changes goes to AVHD-1. In the evening it is snapped");
    stage.say("again: AVHD-1 is not written any more either, and AVHD-2 takes what changes.");
    live(stage, TUESDAY).await?;
    stage.tenby(&["snapshot", "create", NAME, "Tuesday"]).await?;
    stage.show().await
}

async fn wednesday(stage: &mut Stage, proofs: &mut Vec<String>) -> Result<(), Problem> {
    stage.day("Wednesday");
    stage.say("Something happens: an update goes wrong. Back to Monday! There are two ways.");
    live(stage, WEDNESDAY).await?;
    stage.say("\nThe first: keep Wednesday's state as a snapshot of its own, and apply Monday.");
    stage.tenby(&["snapshot", "apply", NAME, "Monday", "--keep-as", "Wednesday"]).await?;
    prove(stage, MONDAY, None).await?;
    stage.say("It is Monday evening again. A new differencing disk stands on the VHD beside AVHD-1;");
    stage.say("Tuesday and Wednesday are a branch of their own.");
    stage.show().await?;
    stage.say("\nNothing was lost: Wednesday can be applied again, and work goes on from there.");
    stage.tenby(&["snapshot", "apply", NAME, "Wednesday", "--discard"]).await?;
    prove(stage, WEDNESDAY, None).await?;
    live(stage, AFTERNOON).await?;
    stage.show().await?;
    stage.say("\nThe second way: discard it, and apply Monday. The file that only this afternoon used");
    stage.say("is deleted at once.");
    stage.tenby(&["snapshot", "apply", NAME, "Monday", "--discard"]).await?;
    prove(stage, MONDAY, Some(proofs)).await?;
    stage.show().await
}

async fn thursday(stage: &mut Stage) -> Result<(), Problem> {
    stage.day("Thursday");
    stage.say("Work goes on from Monday's state, and is snapped in the evening.");
    live(stage, THURSDAY).await?;
    stage.tenby(&["snapshot", "create", NAME, "Thursday"]).await?;
    stage.show().await
}

async fn friday(stage: &mut Stage) -> Result<(), Problem> {
    stage.day("Friday");
    stage.say("More changes; nobody has snapped them yet. They are Now.");
    live(stage, FRIDAY).await?;
    stage.show().await
}

async fn every_one(stage: &mut Stage, proofs: &mut Vec<String>) -> Result<(), Problem> {
    stage.day("Every day again");
    stage.say("Each snapshot is applied in turn, and the witness is asked whether its RAM and its");
    stage.say("disks are that day's. (Friday, which nobody has snapped yet, is kept first.)");
    stage.tenby(&["snapshot", "apply", NAME, "Tuesday", "--keep-as", "Friday"]).await?;
    prove(stage, TUESDAY, Some(proofs)).await?;
    stage.say("(Tuesday goes on for a while, and is kept as well)");
    stage.tenby(&["snapshot", "apply", NAME, "Wednesday", "--keep-as", "Tuesday again"]).await?;
    prove(stage, WEDNESDAY, Some(proofs)).await?;
    stage.tenby(&["snapshot", "apply", NAME, "Thursday", "--discard"]).await?;
    prove(stage, THURSDAY, Some(proofs)).await?;
    stage.tenby(&["snapshot", "apply", NAME, "Friday", "--discard"]).await?;
    prove(stage, FRIDAY, Some(proofs)).await?;
    stage.show().await
}

async fn clean_up(stage: &mut Stage) -> Result<(), Problem> {
    stage.day("Clean-up");
    stage.say("A differencing disk whose snapshot is deleted has one of three fates. The machine");
    stage.say("runs all the while.");
    stage.say("\n1. Nothing stands on Wednesday's: it is removed at once.");
    stage.tenby(&["snapshot", "delete", NAME, "Wednesday", "--wait"]).await?;
    stage.show().await?;
    stage.say("\n2. One file stands on Thursday's: the two are merged into one.");
    stage.tenby(&["snapshot", "delete", NAME, "Thursday", "--wait"]).await?;
    stage.show().await?;
    stage.say("\n3. Two files stand on Monday's, the VHD: it has to wait, though its snapshot is gone.");
    stage.tenby(&["snapshot", "delete", NAME, "Monday", "--wait"]).await?;
    stage.show().await?;
    stage.say("\nAt last a subtree: Tuesday and what hangs under it. Then only one file stands on the");
    stage.say("VHD, and the wait is over: the two are merged.");
    stage.tenby(&["snapshot", "delete", NAME, "Tuesday", "--subtree", "--wait"]).await?;
    stage.show().await?;
    prove(stage, FRIDAY, None).await
}

async fn end(stage: &Stage, proofs: &[String], began: Instant) -> Result<(), Problem> {
    stage.say("\nThe machine is saved, memory and all.");
    stage.tenby(&["vm", "save", NAME]).await?;
    let root = stage.session.root.path().display();
    stage.say(&format!("\nA week in {} s. To look at the machine:\n", began.elapsed().as_secs()));
    stage.say(&format!("  export TENBY_ROOT={root}"));
    stage.say("  tenby vm start Tenby && tenby vm console Tenby      (type `check`, or `help`; Ctrl-] leaves)");
    stage.say("\nTo install tenby, in its repository:\n\n  cargo install --path crates/tenby");
    stage.say("\nYour own machine, from an ISO (or, with --disk FILE, from a disk image that you have):\n");
    for command in YOUR_OWN {
        stage.say(&format!("  {command}"));
    }
    stage.say("\nThe witness has proven:");
    for proof in proofs {
        stage.say(&format!("  {proof}"));
    }
    Ok(())
}

/// A day's work in the guest: something in RAM alone, something on both disks.
async fn live(stage: &Stage, day: Day) -> Result<(), Problem> {
    let Day { name, seed } = day;
    let mut guest = stage.talk().await?;
    for request in [
        format!("set day {name}"),
        format!("fill-ram 16 {seed}"),
        format!("write vda 4M {name} on the first disk"),
        format!("write vdb 8M {name} on the second disk"),
        format!("fill-disk vda 16M {} {seed}", 4 + 2 * seed),
    ] {
        guest.ask(&request).await?;
    }
    let disk = 4 + 2 * seed;
    stage.say(&format!("  (in the guest: \"{name}\" and 16M more in RAM; \"{name}\" and {disk}M more on its disks)"));
    Ok(())
}

/// Holds the guest to a day: its RAM, its disks, and that the two agree.
async fn prove(stage: &Stage, day: Day, proofs: Option<&mut Vec<String>>) -> Result<(), Problem> {
    let Day { name, seed } = day;
    let mut guest = stage.talk().await?;
    let mut wrong = Vec::new();
    let mut hold = |what: &str, said: &serde_json::Value, true_is: serde_json::Value| {
        if *said != true_is {
            wrong.push(format!("{what} says {said}, not {true_is}"));
        }
    };
    hold("RAM", &ask(&mut guest, "get day", "value").await?, name.into());
    hold("RAM's pattern", &ask(&mut guest, "sum-ram", "seeds").await?, serde_json::json!([seed]));
    let check = guest.ask("check").await?;
    hold("the witness", &check["problems"], serde_json::json!([]));
    hold("the first disk", &text(&mut guest, "vda", "4M").await?, format!("{name} on the first disk").into());
    hold("the second disk", &text(&mut guest, "vdb", "8M").await?, format!("{name} on the second disk").into());
    let sum = format!("sum-disk vda 16M {} {seed}", 4 + 2 * seed);
    hold("the first disk's pattern", &ask(&mut guest, &sum, "ok").await?, true.into());
    if !wrong.is_empty() {
        return Err(Problem::failed(format!("{name} is not proven: {}", wrong.join("; "))));
    }
    let proof = format!("RAM and disks proven; {} records of its journal agree", check["flushed"]);
    stage.say(&format!("  (the witness: this is {name}. {proof})"));
    if let Some(proofs) = proofs {
        proofs.push(format!("{name:11}{proof}"));
    }
    Ok(())
}

async fn ask(guest: &mut Guest, request: &str, field: &str) -> Result<serde_json::Value, Problem> {
    Ok(guest.ask(request).await?[field].clone())
}

/// A text on a disk.
async fn text(guest: &mut Guest, disk: &str, at: &str) -> Result<serde_json::Value, Problem> {
    let read = ask(guest, &format!("read {disk} {at} 64"), "text").await?;
    Ok(read.as_str().unwrap_or_default().trim_end_matches('\0').trim_end().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;

    #[test]
    fn the_readme_has_the_same_four_commands_and_they_parse() {
        let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md")).unwrap();
        assert!(readme.contains(&YOUR_OWN.join("\n")), "the README has other commands");
        for command in YOUR_OWN {
            Cli::try_parse_from(command.split(' ')).unwrap();
        }
    }
}
