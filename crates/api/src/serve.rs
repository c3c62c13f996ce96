//! The worker's end: accepts, greets, routes, ends in good order.

use crate::routes;
use crate::types::Hello;
use axum::serve::Listener;
use machine::actor::Handle;
use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};

/// How long answers under way may take once the end has come.
const DRAIN: Duration = Duration::from_secs(5);

/// Why serving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The caller's `until` came.
    Asked,
    /// A newer client wants a worker of its own version.
    HandedOver,
}

/// Serves `handle` on `listener` until `until` comes or a newer client asks for a handover. Returns when the answers that were under
/// way are given: requests that wait for a job are answered early.
pub async fn serve(listener: UnixListener, handle: Handle, hello: Hello, until: impl Future<Output = ()>) -> End {
    let (ending, ends) = watch::channel(false);
    let (hand_over, mut handed_over) = mpsc::channel(1);
    let router = routes::router(routes::Service { handle, hello, ends: ends.clone(), hand_over });
    let server = axum::serve(Guarded { listener, owner: rustix::process::geteuid().as_raw() }, router)
        .with_graceful_shutdown(async move { ended(ends).await });
    let mut server = tokio::spawn(server.into_future());
    let end = tokio::select! {
        () = until => End::Asked,
        Some(()) = handed_over.recv() => End::HandedOver,
    };
    ending.send_replace(true);
    if tokio::time::timeout(DRAIN, &mut server).await.is_err() {
        tracing::warn!("a client did not take its answer; its connection is cut");
        server.abort();
    }
    end
}

/// Returns when serving is to end.
pub(crate) async fn ended(mut ends: watch::Receiver<bool>) {
    // An error means that the sender is gone: that is an end, too.
    let _ = ends.wait_for(|ending| *ending).await;
}

/// Accepts only the socket's owner and root.
struct Guarded {
    listener: UnixListener,
    owner: u32,
}

impl Guarded {
    fn admits(&self, stream: &UnixStream) -> bool {
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == self.owner || peer.uid() == 0 => true,
            Ok(peer) => {
                tracing::warn!("a connection of user {} was refused", peer.uid());
                false
            }
            Err(error) => {
                tracing::warn!("a connection of nobody known was refused: {error}");
                false
            }
        }
    }
}

impl Listener for Guarded {
    type Io = UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (UnixStream, Self::Addr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) if self.admits(&stream) => return (stream, address),
                Ok(_) => {}
                Err(error) => {
                    // Out of descriptors, most likely: that passes.
                    tracing::warn!("accept: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}
