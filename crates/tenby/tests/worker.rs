//! A worker's socket, spoken to as anybody might: what it refuses, and how it says so.

mod place;

use place::Place;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

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

/// Answers on a machine's socket as a worker of another version would, until it is asked to hand over.
fn worker_of_version(place: &Place, version: &str) -> (std::thread::JoinHandle<()>, PathBuf) {
    let machine = place.machine("web");
    let folder = place.runtime(&machine);
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("api.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let hello = json!({ "version": version, "id": machine["id"], "pid": 1 }).to_string();
    let socket = path.clone();
    let serving = std::thread::spawn(move || {
        loop {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = [0; 4096];
            let count = stream.read(&mut bytes).unwrap();
            let asked = String::from_utf8_lossy(&bytes[..count]).into_owned();
            let end = asked.starts_with("POST /v1/handover");
            let (status, body) = if end { ("202 Accepted", "") } else { ("200 OK", hello.as_str()) };
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
            if end {
                drop(listener);
                std::fs::remove_file(&socket).unwrap();
                return;
            }
        }
    });
    (serving, path)
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
