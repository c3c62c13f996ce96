//! `tenby` alone: the machines with state, Now and pending work; where there is none, what to type first.

use crate::demo::YOUR_OWN;
use crate::doctor;
use crate::draw;
use crate::json;
use crate::session::{Reader, Session};
use machine::request::{Problem, View};

pub(crate) async fn run(session: &Session) -> Result<(), Problem> {
    let both = async |reader: &Reader| Ok((reader.view().await?, reader.tree().await?));
    let machines: Vec<_> = session.every(both).await?.into_iter().map(|(_, machine)| machine).collect();
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
