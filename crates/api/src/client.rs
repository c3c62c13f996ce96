//! The client's end.

use crate::routes::{HandOver, VERSION};
use crate::socket;
use crate::types::{
    DeletePlan, Hello, Job, JobId, Jobs, Log, LogLine, MachineId, Problem, Request, Submit, TreeView, View,
};
use crate::version::Version;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The longest answer that is read: a ledger of thousands of snapshots, or a picture of a large screen.
const LONGEST_ANSWER: usize = 256 << 20;

/// How long a worker may take for an answer that waits for nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long it may take to say who it is.
const GREETING: Duration = Duration::from_secs(10);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers, or the worker died before its answer was complete. The request may be sent again.
    #[error("the worker does not answer: {0}")]
    Gone(#[source] io::Error),
    /// The worker's answer: a failure or a refusal.
    #[error(transparent)]
    Problem(#[from] Problem),
    /// The answer makes no sense.
    #[error("the worker's answer makes no sense: {0}")]
    Nonsense(String),
}

/// Talks to one machine's worker.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    version: Version,
}

impl Client {
    /// A client of the worker whose runtime folder this is. Nothing is opened yet.
    pub fn new(folder: &Path) -> Self {
        Self { socket: folder.join(socket::NAME), version: Version::own() }
    }

    /// The same, speaking as another version (for tests).
    #[must_use]
    pub fn speaking(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// Who answers.
    pub async fn hello(&self) -> Result<Hello, Error> {
        decode(&self.send(Method::GET, "/v1/hello", None::<&()>, GREETING).await?)
    }

    /// Asks an older worker to end in good order.
    pub async fn hand_over(&self) -> Result<(), Error> {
        self.send(Method::POST, "/v1/handover", Some(&HandOver { version: self.version }), PATIENCE).await.map(drop)
    }

    /// The machine.
    pub async fn view(&self, vm: MachineId) -> Result<View, Error> {
        self.get(&format!("/v1/vms/{vm}")).await
    }

    /// Its snapshots.
    pub async fn tree(&self, vm: MachineId) -> Result<TreeView, Error> {
        self.get(&format!("/v1/vms/{vm}/snapshots")).await
    }

    /// Asks for something; see [`Handle::submit`](machine::actor::Handle::submit).
    pub async fn submit(&self, vm: MachineId, job: JobId, request: Request) -> Result<Job, Error> {
        let path = format!("/v1/vms/{vm}/requests");
        decode(&self.send(Method::POST, &path, Some(&Submit { job, request }), PATIENCE).await?)
    }

    /// All jobs that the worker remembers, oldest first.
    pub async fn jobs(&self) -> Result<Vec<Job>, Error> {
        self.get::<Jobs>("/v1/jobs").await.map(|jobs| jobs.jobs)
    }

    /// A job, after it has changed from what was `seen` or has ended; at the latest after `wait`, and never much later than 30 s.
    pub async fn job(&self, id: JobId, seen: Option<u64>, wait: Duration) -> Result<Job, Error> {
        let seen = seen.map(|seen| format!("&seen={seen}")).unwrap_or_default();
        let path = format!("/v1/jobs/{id}?wait_ms={}{seen}", wait.as_millis());
        decode(&self.send(Method::GET, &path, None::<&()>, wait + PATIENCE).await?)
    }

    /// Asks a job to cancel.
    pub async fn cancel(&self, id: JobId) -> Result<Job, Error> {
        decode(&self.send(Method::POST, &format!("/v1/jobs/{id}/cancel"), None::<&()>, PATIENCE).await?)
    }

    /// Pauses a job.
    pub async fn pause(&self, id: JobId) -> Result<Job, Error> {
        decode(&self.send(Method::POST, &format!("/v1/jobs/{id}/pause"), None::<&()>, PATIENCE).await?)
    }

    /// Lets a paused job go on.
    pub async fn resume(&self, id: JobId) -> Result<Job, Error> {
        decode(&self.send(Method::POST, &format!("/v1/jobs/{id}/resume"), None::<&()>, PATIENCE).await?)
    }

    /// Limits a job to so many bytes a second; 0 lifts the limit.
    pub async fn throttle(&self, id: JobId, bytes_per_second: u64) -> Result<Job, Error> {
        let path = format!("/v1/jobs/{id}/throttle?bytes_per_second={bytes_per_second}");
        decode(&self.send(Method::POST, &path, None::<&()>, PATIENCE).await?)
    }

    /// What deleting `snapshot` would do.
    pub async fn plan_delete(&self, vm: MachineId, snapshot: &str, subtree: bool) -> Result<DeletePlan, Error> {
        self.get(&format!("/v1/vms/{vm}/delete-plan?snapshot={}&subtree={subtree}", escape(snapshot))).await
    }

    /// The ledger's rows.
    pub async fn ledger(&self, vm: MachineId) -> Result<serde_json::Value, Error> {
        self.get(&format!("/v1/vms/{vm}/ledger")).await
    }

    /// The machine's log.
    pub async fn log(&self, vm: MachineId) -> Result<Vec<LogLine>, Error> {
        self.get::<Log>(&format!("/v1/vms/{vm}/log")).await.map(|log| log.log)
    }

    /// A picture of the screen, PNG.
    pub async fn screenshot(&self, vm: MachineId) -> Result<Bytes, Error> {
        self.send(Method::GET, &format!("/v1/vms/{vm}/screenshot"), None::<&()>, PATIENCE).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        decode(&self.send(Method::GET, path, None::<&()>, PATIENCE).await?)
    }

    /// One request on a connection of its own, and the answer's body.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        patience: Duration,
    ) -> Result<Bytes, Error> {
        let late = |_| {
            Error::Gone(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", patience.as_secs())))
        };
        tokio::time::timeout(patience, self.exchange(method, path, body)).await.map_err(late)?
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<Bytes, Error> {
        let stream = socket::connect(&self.socket).await.map_err(Error::Gone)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(gone)?;
        let driver = tokio::spawn(connection);
        let body = body.map(serde_json::to_vec).transpose().map_err(|error| Error::Nonsense(error.to_string()))?;
        let request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "worker")
            .header(CONTENT_TYPE, "application/json")
            .header(VERSION, self.version.to_string())
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| Error::Nonsense(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(gone)?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), LONGEST_ANSWER)
            .collect()
            .await
            .map_err(|error| Error::Gone(io::Error::other(error)));
        driver.abort();
        judge(status, answer?.to_bytes())
    }
}

/// The answer, or the problem that it is.
fn judge(status: StatusCode, answer: Bytes) -> Result<Bytes, Error> {
    if status.is_success() {
        return Ok(answer);
    }
    match serde_json::from_slice::<Problem>(&answer) {
        Ok(problem) => Err(Error::Problem(problem)),
        Err(_) => Err(Error::Nonsense(format!("status {status}"))),
    }
}

fn decode<T: DeserializeOwned>(answer: &Bytes) -> Result<T, Error> {
    serde_json::from_slice(answer).map_err(|error| Error::Nonsense(error.to_string()))
}

fn gone(error: hyper::Error) -> Error {
    Error::Gone(io::Error::other(error))
}

/// A text as part of a query: everything but letters, digits and `-._~` in per cent (RFC 3986).
fn escape(text: &str) -> String {
    use std::fmt::Write;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a string never fails");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_anything_in_it_travels_in_a_query() {
        assert_eq!(escape("a b&c=ü"), "a%20b%26c%3D%C3%BC");
    }

    #[tokio::test]
    async fn where_nobody_listens_the_worker_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Client::new(folder.path()).hello().await, Err(Error::Gone(_))));
    }

    #[tokio::test]
    async fn a_worker_that_dies_in_mid_answer_is_gone_and_nonsense_is_nonsense() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let folder = tempfile::tempdir().unwrap();
        let (listener, _socket) = crate::Socket::bind(folder.path()).unwrap();
        let worker = async {
            for answer in
                ["HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"]
            {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        };
        let client = Client::new(folder.path());
        let asking = async { (client.hello().await, client.hello().await) };
        let ((), (first, second)) = tokio::join!(worker, asking);
        assert!(matches!(first, Err(Error::Gone(_))), "{first:?}");
        assert!(matches!(second, Err(Error::Nonsense(_))), "{second:?}");
    }
}
