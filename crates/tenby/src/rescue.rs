//! `tenby vm rescue`: a machine whose ledger is lost, from its files.

use crate::cli::words::existing_file;
use crate::draw;
use crate::session::Session;
use machine::request::Problem;
use machine::rescue::rescue;
use std::path::PathBuf;

/// Rescues the machine of this folder, and tells what came back and what could not be known.
pub(crate) async fn run(session: &Session, folder: PathBuf, named: &[PathBuf]) -> Result<(), Problem> {
    let named: Vec<String> = named.iter().map(|file| existing_file(file)).collect::<Result<_, _>>()?;
    let root = session.root.clone();
    // Nothing holds off Ctrl-C: a rescue that is cut off has changed nothing.
    let rescued = tokio::task::spawn_blocking(move || rescue(&root, &folder, &named)).await;
    let rescued = rescued.map_err(|error| Problem::failed(format!("the rescue broke off: {error}")))??;
    session.out.show(&rescued, |look| draw::rescued(&rescued, look));
    Ok(())
}
