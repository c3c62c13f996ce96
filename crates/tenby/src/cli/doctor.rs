//! `tenby doctor`

use crate::doctor::{draw, examine, root};
use crate::out::Out;
use machine::request::Problem;
use std::path::Path;

pub(crate) async fn run(said: Option<&Path>, out: &Out) -> Result<(), Problem> {
    let findings = examine(&root(said)?).await;
    out.show(&findings, |look| draw(&findings, look));
    Ok(())
}
