//! `tenby vm check`: what is wrong with a machine's files.

use crate::draw;
use crate::session::Session;
use crate::work::{interruptible, look};
use machine::audit::{Audit, Finding, Looked, audit, deep};
use machine::request::Problem;
use machine::root::Found;
use machine::tree::Machine;

/// How often it is looked again because files came and went meanwhile.
const LOOKS: usize = 5;

/// Looks at all files of a machine; nothing is written. With `deeply`, reads what is sealed and compares it with what was recorded.
pub(crate) async fn run(session: &Session, found: &Found, deeply: bool) -> Result<(), Problem> {
    let mut audit = settled(session, found).await?;
    if deeply {
        deepen(session, found, &mut audit).await?;
    }
    session.out.show(&audit, |_| draw::audit(&found.name, &audit));
    if !audit.clean {
        // The document is the report, also with `--json`; what is left is a line for people, and the code.
        let damage = audit.findings.iter().filter(|finding| !finding.is_note()).count();
        let findings = draw::count(damage, "finding");
        let problem = Problem::damaged(format!("{}: its files are damaged: {findings}", found.name));
        session.out.failure(&problem);
        std::process::exit(problem.kind.code().into());
    }
    Ok(())
}

/// An audit during which the tree did not change.
async fn settled(session: &Session, found: &Found) -> Result<Audit, Problem> {
    let files = session.root.files(found.id)?;
    for _ in 0..LOOKS {
        let Rows { machine, journalled, worker } = Rows::read(session, found).await?;
        let (layers, files) = (machine.layers.clone(), files.clone());
        let work = move || audit(&machine, &files, worker, &journalled);
        let audit = look(&session.out, format!("checking {}", found.name), work).await?;
        if audit.findings.iter().all(Finding::is_note) || Rows::read(session, found).await?.machine.layers == layers {
            return Ok(audit);
        }
    }
    Err(Problem::refused(format!("the files of {} change too often just now to be checked", found.name))
        .hint(format!("tenby job list {}", crate::cli::quoted(&found.name))))
}

/// Adds to an audit what reading all that is sealed comes to.
async fn deepen(session: &Session, found: &Found, audit: &mut Audit) -> Result<(), Problem> {
    let files = session.root.files(found.id)?;
    let (own, its, runtime) = (session.clone(), found.clone(), tokio::runtime::Handle::current());
    let (compared, findings) = interruptible(&session.out, format!("reading {}", found.name), move |progress| {
        let mut look = || {
            let Rows { machine, worker, .. } = runtime.block_on(Rows::read(&own, &its))?;
            Ok(Looked { machine, worker })
        };
        deep(&files, &mut look, progress)
    })
    .await?;
    if findings.iter().any(|finding| finding.kind == "unhashed") {
        // A worker makes what is missing; where none runs, one is started for that. If it cannot be, the next one does it.
        if let Err(problem) = session.worker(found).await {
            tracing::warn!("no worker to make the missing hashes: {problem}");
        }
    }
    audit.deepen(compared, findings);
    Ok(())
}

/// What a machine's ledger says.
struct Rows {
    machine: Machine,
    /// The files of requests under way.
    journalled: Vec<String>,
    worker: bool,
}

impl Rows {
    async fn read(session: &Session, found: &Found) -> Result<Self, Problem> {
        let reader = session.reader(found).await?;
        let worker = reader.view().await?.worker.is_some();
        let mut rows = reader.ledger().await?;
        let journals = rows["journal"].as_object().into_iter().flat_map(|journals| journals.values());
        let files = journals.filter_map(|journal| journal["files"].as_array()).flatten();
        let journalled = files.filter_map(|file| file.as_str()).map(str::to_owned).collect();
        let machine = serde_json::from_value(rows["machine"].take())
            .map_err(|error| Problem::failed(format!("the rows of {} make no sense: {error}", found.name)))?;
        Ok(Self { machine, journalled, worker })
    }
}
