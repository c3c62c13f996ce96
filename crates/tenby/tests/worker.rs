//! A worker's socket, spoken to as anybody might: what it refuses, and how it says so.

mod place;

use place::Place;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;

/// A worker of a machine that is off, and its machine's id.
struct Worker {
    socket: PathBuf,
    id: String,
    _place: Place,
}

/// An answer: its status, its media type, its document.
#[derive(Debug)]
struct Answer {
    status: u16,
    kind: String,
    body: Value,
}

impl Worker {
    fn start() -> Self {
        let place = Place::with_machine("web");
        place.tenby(&["snapshot", "create", "web", "Monday"]).well();
        let machine = place.machine("web");
        Self {
            socket: place.runtime(&machine).join("api.sock"),
            id: machine["id"].as_str().unwrap().to_owned(),
            _place: place,
        }
    }

    fn say(&self, request: &str) -> Answer {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        // Who is refused is told so before all was read; then the rest of a long request has nowhere to go.
        let _ = stream.write_all(request.as_bytes());
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let kind = head.lines().find_map(|line| line.strip_prefix("content-type: ")).unwrap_or_default().to_owned();
        Answer { status, kind, body: serde_json::from_str(body).unwrap_or(Value::Null) }
    }

    fn get(&self, path: &str) -> Answer {
        self.say(&format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
    }

    fn post(&self, path: &str, body: &str) -> Answer {
        let length = body.len();
        let head = "Host: x\r\nConnection: close\r\nContent-Type: application/json";
        self.say(&format!("POST {path} HTTP/1.1\r\n{head}\r\nContent-Length: {length}\r\n\r\n{body}"))
    }
}

#[test]
fn it_answers_with_the_machines_own_values() {
    let worker = Worker::start();
    let id = &worker.id;
    let hello = worker.get("/v1/hello");
    assert_eq!((hello.status, hello.body["id"].as_str()), (200, Some(id.as_str())));
    assert_eq!(worker.get(&format!("/v1/vms/{id}")).body["name"], "web");
    assert_eq!(worker.get("/v1/vms/web").body["id"], id.as_str(), "by its name, too");
    assert_eq!(worker.get("/v1/vms/web/snapshots").body["snapshots"][0]["name"], "Monday");
    assert_eq!(worker.get("/v1/jobs").body["jobs"][0]["state"], "completed");
    assert!(worker.get("/v1/vms/web/log").body["log"].is_array());
    assert!(worker.get("/v1/vms/web/ledger").body.is_object());
    let plan = worker.get("/v1/vms/web/delete-plan?snapshot=Monday");
    assert_eq!(plan.body["snapshots"].as_array().unwrap().len(), 1, "{plan:?}");
}

#[test]
fn a_request_sent_twice_is_one_job() {
    let worker = Worker::start();
    let job = "0000000000004000800000000000002a";
    let request = json!({ "job": job, "request": { "verb": "snapshot", "name": "once" } }).to_string();
    for _ in 0..3 {
        let answer = worker.post("/v1/vms/web/requests", &request);
        assert_eq!((answer.status, answer.body["id"].as_str()), (202, Some(job)), "{answer:?}");
    }
    let ended = worker.get(&format!("/v1/jobs/{job}?wait_ms=20000"));
    assert_eq!(ended.body["state"], "completed");
    let snapshots = worker.get("/v1/vms/web/snapshots").body["snapshots"].as_array().unwrap().len();
    assert_eq!(snapshots, 2);
}

#[test]
fn what_it_refuses_it_refuses_as_a_problem() {
    let worker = Worker::start();
    let no_job = "/v1/jobs/00000000-0000-4000-8000-000000000001";
    let impossible = json!({ "job": "00000000000040008000000000000002", "request": { "verb": "pause" } }).to_string();
    for (answer, status, kind) in [
        (worker.get("/v2/hello"), 404, "not-found"),
        (worker.get("/v1/vms/other"), 404, "not-found"),
        (worker.get(no_job), 404, "not-found"),
        (worker.get("/v1/jobs/nonsense"), 404, "not-found"),
        (worker.get(&format!("{no_job}?wait_ms=soon")), 400, "usage"),
        (worker.get("/v1/vms/web/delete-plan"), 400, "usage"),
        (worker.get("/v1/vms/web/delete-plan?snapshot=nix"), 404, "not-found"),
        (worker.get("/v1/vms/web/screenshot"), 409, "refused"),
        (worker.post("/v1/vms/web/requests", "{"), 400, "usage"),
        (worker.post("/v1/vms/web/requests", r#"{"job":1}"#), 400, "usage"),
        (worker.post("/v1/vms/other/requests", &impossible), 404, "not-found"),
        (worker.post(&format!("{no_job}/cancel"), ""), 404, "not-found"),
        (worker.post("/v1/handover", r#"{"version":"new"}"#), 400, "usage"),
    ] {
        assert_eq!(answer.status, status, "{answer:?}");
        assert_eq!(answer.kind, "application/problem+json", "{answer:?}");
        assert_eq!(answer.body["kind"], kind, "{answer:?}");
        assert_eq!(answer.body["status"], status, "{answer:?}");
        assert_ne!(answer.body["detail"].as_str().unwrap_or_default(), "", "{answer:?}");
    }
    // What only the machine's state forbids is a job that fails.
    worker.post("/v1/vms/web/requests", &impossible);
    let refused = worker.get("/v1/jobs/00000000000040008000000000000002?wait_ms=20000");
    assert_eq!((&refused.body["state"], &refused.body["error"]["kind"]), (&json!("failed"), &json!("refused")));
}

#[test]
fn nothing_that_is_sent_ends_it() {
    let worker = Worker::start();
    let long = "x".repeat(2 << 20);
    let answer = worker.post("/v1/vms/web/requests", &format!(r#"{{"job":"{long}"}}"#));
    assert_ne!(answer.status / 100, 2, "{answer:?}");
    worker.say("nonsense\r\n\r\n");
    worker.say(&format!("GET /{} HTTP/1.1\r\n\r\n", "y".repeat(1 << 20)));
    worker.say(&format!("GET / HTTP/1.1\r\nx: {long}\r\n\r\n"));
    drop(UnixStream::connect(&worker.socket).unwrap());
    assert_eq!(worker.get("/v1/hello").status, 200);
}

/// What a worker that is played does about a request.
enum Play {
    Answer(Value),
    /// Nothing; the connection stays open.
    Silence,
    /// It says that it has heard, and is gone.
    HandOver,
}

/// Reads a request to its end: its first line, and its document.
fn heard(stream: &mut UnixStream) -> (String, Value) {
    let mut stream = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        line.trim_end().to_ascii_lowercase()
    };
    let first = line();
    let head: Vec<String> = std::iter::from_fn(|| Some(line()).filter(|line| !line.is_empty())).collect();
    let length = head.iter().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).unwrap();
    (first, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

/// Answers on a machine's socket in its worker's place.
fn played(place: &Place, mut play: impl FnMut(&str, &Value) -> Play + Send + 'static) -> (JoinHandle<()>, PathBuf) {
    let folder = place.runtime(&place.machine("web"));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("api.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let socket = path.clone();
    let serving = std::thread::spawn(move || {
        let mut open = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().unwrap();
            let (line, document) = heard(&mut stream);
            let play = play(&line, &document);
            let body = match &play {
                Play::Answer(document) => document.to_string(),
                Play::Silence => {
                    open.push(stream);
                    continue;
                }
                Play::HandOver => String::new(),
            };
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
            if matches!(play, Play::HandOver) {
                std::fs::remove_file(&socket).unwrap();
                return;
            }
        }
    });
    (serving, path)
}

fn hello(place: &Place, version: &str) -> Value {
    json!({ "version": version, "id": place.machine("web")["id"], "pid": 1 })
}

/// A worker of another version, until it is asked to hand over.
fn worker_of_version(place: &Place, version: &str) -> (JoinHandle<()>, PathBuf) {
    let hello = hello(place, version);
    played(place, move |line, _| match line.starts_with("post /v1/handover") {
        true => Play::HandOver,
        false => Play::Answer(hello.clone()),
    })
}

#[test]
fn an_older_worker_is_asked_to_hand_over() {
    let place = Place::with_machine("web");
    let (older, _) = worker_of_version(&place, "0.0.1");
    place.tenby(&["snapshot", "create", "web", "Monday"]).well();
    older.join().unwrap();
    assert_eq!(place.names("web"), ["Monday"]);
}

#[test]
fn a_newer_worker_is_left_alone_and_both_versions_are_named() {
    let place = Place::with_machine("web");
    let (_newer, socket) = worker_of_version(&place, "999.0.0");
    let refused = place.tenby(&["snapshot", "create", "web", "Monday"]).with(3);
    assert!(refused.err.contains("999.0.0") && refused.err.contains(env!("CARGO_PKG_VERSION")), "{refused:?}");
    assert!(socket.exists());
}

/// A command whose request a worker has read and not answered.
struct Unanswered {
    place: Place,
    child: Child,
    /// Lets the worker answer.
    answer: mpsc::Sender<()>,
}

impl Unanswered {
    fn begin() -> Self {
        let place = Place::with_machine("web");
        let ((read, was_read), (answer, may_answer)) = (mpsc::channel(), mpsc::channel());
        let hello = hello(&place, env!("CARGO_PKG_VERSION"));
        let mut job = json!({
            "id": null, "vm": "web", "kind": "snapshot", "state": "running", "percent": 0, "bytes_done": 0, "bytes_total": 0,
            "eta": null, "error": null, "started": "2026-01-01T00:00:00Z", "ended": null,
        });
        played(&place, move |line, asked| {
            if line.starts_with("get /v1/hello") {
                return Play::Answer(hello.clone());
            } else if line.contains("/requests ") {
                job["id"] = asked["job"].clone();
                read.send(()).unwrap();
                if may_answer.recv().is_err() {
                    return Play::Silence;
                }
            } else if line.contains("/cancel ") {
                job["state"] = json!("cancelled");
            }
            Play::Answer(job.clone())
        });
        let said = File::create(place.path("said")).unwrap();
        let child = place.command(&["snapshot", "create", "web", "Monday"]).stdout(Stdio::null()).stderr(said).spawn();
        was_read.recv().unwrap();
        Self { place, child: child.unwrap(), answer }
    }

    fn tell(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.place.path("said")).unwrap()
    }

    /// Ctrl-C, until it was heard.
    fn cancel(&self) {
        self.tell(Signal::INT);
        place::eventually("that it is cancelled", || self.said().contains("once more leaves it running"));
    }

    #[track_caller]
    fn ends_with(&mut self, words: &str) {
        assert_eq!(
            (self.child.wait().unwrap().code(), self.said().contains(words)),
            (Some(130), true),
            "{}",
            self.said()
        );
    }
}

#[test]
fn what_is_cancelled_before_the_worker_has_answered_is_cancelled_by_it() {
    let mut asked = Unanswered::begin();
    asked.cancel();
    asked.answer.send(()).unwrap();
    asked.ends_with("the snapshot of web was cancelled; nothing has changed");
}

#[test]
fn a_worker_that_does_not_answer_can_be_left() {
    let mut asked = Unanswered::begin();
    asked.cancel();
    asked.tell(Signal::INT);
    asked.ends_with("tenby job watch ");
    let mut asked = Unanswered::begin();
    asked.tell(Signal::TERM);
    asked.ends_with("left running: job ");
}

#[test]
fn a_worker_that_does_not_greet_was_asked_for_nothing() {
    let place = Place::with_machine("web");
    let (come, has_come) = mpsc::channel();
    played(&place, move |_, _| {
        come.send(()).unwrap();
        Play::Silence
    });
    let said = File::create(place.path("said")).unwrap();
    let child = place.command(&["snapshot", "create", "web", "Monday"]).stdout(Stdio::null()).stderr(said).spawn();
    has_come.recv().unwrap();
    let mut asked = Unanswered { place, child: child.unwrap(), answer: mpsc::channel().0 };
    asked.tell(Signal::INT);
    asked.ends_with("nothing was asked of web");
}
