//! The client against a server that we play.

use super::*;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::io::IoSliceMut;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#;
const STOP: &str = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#;

/// The other end.
struct Server {
    stream: BufReader<UnixStream>,
}

impl Server {
    async fn say(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.expect("it is taken");
        self.stream.write_all(b"\r\n").await.expect("it is taken");
    }

    /// The next command: its name and its id.
    async fn hear(&mut self) -> (String, u64) {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.expect("a line");
        let command: Value = serde_json::from_str(&line).expect("JSON");
        let name = command["execute"].as_str().or(command["exec-oob"].as_str()).expect("a command");
        (name.to_owned(), command["id"].as_u64().expect("an id"))
    }

    async fn answer(&mut self, id: u64, value: &str) {
        self.say(&format!(r#"{{"return": {value}, "id": {id}}}"#)).await;
    }
}

fn pair() -> (UnixStream, Server) {
    let (ours, theirs) = UnixStream::pair().expect("a socket");
    (ours, Server { stream: BufReader::new(theirs) })
}

/// A connection whose greeting is over, and the events that its observer saw.
async fn connected() -> (Qmp, Server, Arc<Mutex<Vec<Event>>>) {
    let (ours, mut server) = pair();
    let seen = Arc::new(Mutex::new(vec![]));
    let observer = seen.clone();
    let connect = Qmp::connect(ours, move |event| observer.lock().expect("the list").push(event.clone()));
    let greet = async {
        server.say(GREETING).await;
        let (name, id) = server.hear().await;
        assert_eq!(name, "qmp_capabilities");
        server.answer(id, "{}").await;
    };
    let (qmp, ()) = tokio::join!(connect, greet);
    (qmp.expect("it connects"), server, seen)
}

#[tokio::test]
async fn a_greeting() {
    let (qmp, _server, _) = connected().await;
    assert_eq!(qmp.version(), Version { major: 10, minor: 0, micro: 2 });
    assert!(qmp.version() > Version { major: 9, minor: 2, micro: 9 });
}

#[tokio::test]
async fn peers_that_do_not_speak_qmp() {
    for words in ["SSH-2.0-OpenSSH", "", "{", STOP, r#"{"return": {}, "id": 1}"#, "\u{0}", r#"{"QMP": 7}"#] {
        let (ours, mut server) = pair();
        let talk = async move {
            server.say(words).await;
            drop(server);
        };
        let (result, ()) = tokio::join!(Qmp::connect(ours, |_| {}), talk);
        let error = result.expect_err(words);
        assert!(matches!(error, Error::Protocol(_) | Error::Disconnected), "{words}: {error}");
    }
}

#[tokio::test]
async fn a_peer_that_floods() {
    let (ours, server) = pair();
    let mut stream = server.stream.into_inner();
    let flood = async move {
        let bytes = vec![b'x'; 1 << 20];
        while stream.write_all(&bytes).await.is_ok() {}
    };
    let (result, ()) = tokio::join!(Qmp::connect(ours, |_| {}), flood);
    assert!(matches!(result, Err(Error::Protocol(_))));
}

#[tokio::test]
async fn answers_find_their_callers_whatever_comes_between() {
    let (qmp, mut server, seen) = connected().await;
    let mut events = qmp.events();
    let serve = async {
        let (first, one) = server.hear().await;
        let (second, two) = server.hear().await;
        assert_eq!((first.as_str(), second.as_str()), ("query-status", "query-yank"));
        server.say(STOP).await;
        server.answer(two, "[]").await;
        // In halves, with another event between.
        let answer = format!(r#"{{"return": {{"running": false, "status": "paused"}}, "id": {one}}}"#);
        server.stream.write_all(&answer.as_bytes()[..20]).await.expect("it is taken");
        tokio::task::yield_now().await;
        server.stream.write_all(&answer.as_bytes()[20..]).await.expect("it is taken");
        server.say("").await;
    };
    let (status, held, ()) = tokio::join!(qmp.status(), qmp.migration_held(), serve);
    assert_eq!(status.expect("an answer").status, "paused");
    assert!(!held.expect("an answer"));
    assert_eq!(seen.lock().expect("the list").len(), 1);
    let event = events.next().await.expect("an event");
    assert_eq!((event.kind, event.at), (EventKind::Stop, Some(Stamp::from_micros(1_000_002))));
}

#[tokio::test]
async fn the_observer_has_seen_what_an_answer_implies() {
    let (qmp, mut server, seen) = connected().await;
    for round in 1..100 {
        let serve = async {
            let (_, id) = server.hear().await;
            server.say(STOP).await;
            server.answer(id, "{}").await;
        };
        let (stopped, ()) = tokio::join!(qmp.stop(), serve);
        stopped.expect("an answer");
        assert_eq!(seen.lock().expect("the list").len(), round);
    }
}

#[tokio::test]
async fn a_refusal_has_qemus_words() {
    let (qmp, mut server, _) = connected().await;
    let serve = async {
        let (_, id) = server.hear().await;
        server.say(&format!(r#"{{"error": {{"class": "GenericError", "desc": "no way"}}, "id": {id}}}"#)).await;
    };
    let (result, ()) = tokio::join!(qmp.cont(), serve);
    assert_eq!(result.expect_err("a refusal").to_string(), "QEMU refused cont: no way");
}

#[tokio::test]
async fn an_answer_of_another_shape() {
    let (qmp, mut server, _) = connected().await;
    let serve = async {
        let (_, id) = server.hear().await;
        server.answer(id, "[1, 2]").await;
        let (_, id) = server.hear().await;
        server.answer(id, "{}").await;
    };
    let ask = async {
        assert!(matches!(qmp.status().await, Err(Error::Protocol(_))));
        // The connection is none the worse.
        qmp.stop().await.expect("an answer");
    };
    tokio::join!(ask, serve);
}

#[tokio::test]
async fn whoever_waits_learns_of_the_end() {
    let (qmp, mut server, _) = connected().await;
    let mut events = qmp.events();
    let serve = async move {
        server.hear().await;
        drop(server);
    };
    let (answer, event, ()) = tokio::join!(qmp.stop(), events.next(), serve);
    assert!(matches!(answer, Err(Error::Disconnected)));
    assert!(matches!(event, Err(Error::Disconnected)));
    assert!(matches!(qmp.stop().await, Err(Error::Disconnected)));
    assert!(matches!(qmp.events().next().await, Err(Error::Disconnected)));
}

#[tokio::test]
async fn garbage_ends_the_connection() {
    let not_asked = format!(r#"{{"return": {{}}, "id": {}}}"#, i64::MAX);
    for words in ["garbage", &not_asked, r#"{"error": {"class": "x", "desc": "no"}}"#, GREETING] {
        let (qmp, mut server, _) = connected().await;
        let serve = async {
            server.hear().await;
            server.say(words).await;
            // We hang up, too: the peer cannot be trusted any more.
            let mut rest = vec![];
            server.stream.read_to_end(&mut rest).await.expect("the end");
        };
        let ask = async {
            assert!(matches!(qmp.stop().await, Err(Error::Disconnected)), "{words}");
            drop(qmp);
        };
        tokio::join!(ask, serve);
    }
}

#[tokio::test]
async fn what_was_meant_for_the_client_before_is_dropped() {
    let (ours, mut server) = pair();
    let seen = Arc::new(Mutex::new(vec![]));
    let observer = seen.clone();
    let connect = Qmp::connect(ours, move |event| observer.lock().expect("the list").push(event.clone()));
    let greet = async {
        server.say(STOP).await;
        server.answer(1, "{}").await;
        server.say(GREETING).await;
        let (_, id) = server.hear().await;
        server.answer(2, r#"{"running": true}"#).await;
        server.answer(id, "{}").await;
        id
    };
    let (qmp, first) = tokio::join!(connect, greet);
    let qmp = qmp.expect("it connects");
    let serve = async {
        let (_, id) = server.hear().await;
        server.answer(first - 1, r#"{"status": "somebody else's"}"#).await;
        server.say(STOP).await;
        server.answer(id, r#"{"running": false, "status": "paused"}"#).await;
    };
    let (status, ()) = tokio::join!(qmp.status(), serve);
    assert_eq!(status.expect("an answer").status, "paused");
    assert_eq!(seen.lock().expect("the list").len(), 1);
}

#[tokio::test]
async fn a_caller_that_gives_up_harms_nobody() {
    let (qmp, mut server, _) = connected().await;
    {
        let mut stop = std::pin::pin!(qmp.stop());
        tokio::select! {
            biased;
            _ = &mut stop => panic!("nobody answered"),
            () = std::future::ready(()) => {}
        }
    }
    let serve = async {
        let (given_up, first) = server.hear().await;
        let (name, second) = server.hear().await;
        assert_eq!((given_up.as_str(), name.as_str()), ("stop", "cont"));
        server.answer(first, "{}").await;
        server.answer(second, "{}").await;
    };
    let (result, ()) = tokio::join!(qmp.cont(), serve);
    result.expect("an answer");
}

#[tokio::test]
async fn the_last_handle_ends_the_connection() {
    let (qmp, mut server, _) = connected().await;
    let clone = qmp.clone();
    drop(qmp);
    let serve = async {
        let (_, id) = server.hear().await;
        server.answer(id, "{}").await;
    };
    let (result, ()) = tokio::join!(clone.stop(), serve);
    result.expect("the clone still works");
    drop(clone);
    let mut rest = vec![];
    server.stream.read_to_end(&mut rest).await.expect("the end");
    assert_eq!(rest, b"");
}

#[tokio::test]
async fn a_subscriber_that_sleeps_is_told_so() {
    let (qmp, mut server, _) = connected().await;
    let mut events = qmp.events();
    let serve = async {
        for _ in 0..=EVENT_BACKLOG {
            server.say(STOP).await;
        }
        let (_, id) = server.hear().await;
        server.answer(id, "{}").await;
    };
    let (result, ()) = tokio::join!(qmp.stop(), serve);
    result.expect("an answer");
    assert!(matches!(events.next().await, Err(Error::EventsMissed(1))));
    assert_eq!(events.next().await.expect("the rest").kind, EventKind::Stop);
}

#[tokio::test]
async fn a_descriptor_travels_with_its_command() {
    let (qmp, mut server, _) = connected().await;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a socket");
    let serve = async {
        let stream = server.stream.get_ref();
        let mut line = [0; 4096];
        let (length, passed) =
            stream.async_io(Interest::READABLE, || receive(stream, &mut line)).await.expect("a line");
        let command: Value = serde_json::from_slice(&line[..length]).expect("JSON");
        assert_eq!((&command["execute"], &command["arguments"]["fdname"]), (&json!("getfd"), &json!("stream")));
        server.answer(command["id"].as_u64().expect("an id"), "{}").await;
        passed.expect("a descriptor")
    };
    let (result, passed) = tokio::join!(qmp.pass("stream", theirs.into()), serve);
    result.expect("an answer");
    let passed = std::os::unix::net::UnixStream::from(passed);
    std::io::Write::write_all(&mut &passed, b"through").expect("it is taken");
    // Ours is the only other end: theirs was closed here once it was passed.
    drop(passed);
    let mut all = String::new();
    std::io::Read::read_to_string(&mut &ours, &mut all).expect("the end");
    assert_eq!(all, "through");
}

fn receive(stream: &UnixStream, line: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(line)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let rights = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    Ok((received.bytes, rights))
}
