//! `tenby vm console` (to come).

use crate::session::Session;
use machine::request::Problem;
use machine::root::Found;

#[expect(clippy::unused_async, reason = "it talks to the hub, soon")]
pub(crate) async fn run(_session: &Session, _found: &Found) -> Result<(), Problem> {
    Err(Problem::failed("not yet"))
}
