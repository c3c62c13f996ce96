//! `tenby` alone: the machines with state, Now and pending work; where there is none, what to type first.

use crate::demo::YOUR_OWN;
use crate::doctor;
use crate::draw;
use crate::json;
use crate::session::Session;
use machine::request::{Problem, View};

pub(crate) async fn run(session: &Session) -> Result<(), Problem> {
    let mut machines = Vec::new();
    for found in session.root.list()? {
        let reader = session.reader(&found).await?;
        machines.push((reader.view().await?, reader.tree().await?));
    }
    if session.out.json() {
        let vms: Vec<View> = machines.into_iter().map(|(view, _)| view).collect();
        session.out.document(&json::Machines { vms: &vms });
        return Ok(());
    }
    if machines.is_empty() {
        let verdict = doctor::verdict(&doctor::examine(session.root.path()).await);
        let first = YOUR_OWN.join("\n  ");
        session.out.text(&format!("There is no machine yet. The first commands:\n\n  {first}\n\n{verdict}\n"));
        return Ok(());
    }
    session.out.text(&draw::home(&machines, session.out.look()));
    Ok(())
}
