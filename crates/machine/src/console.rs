//! The serial console for any number of clients: a socket that first gives the last 64 KiB, then everything as it comes, and takes
//! what is typed. It outlives each QEMU of the machine; what cannot be delivered ends the connection, so that the client can say so.

use crate::request::Problem;
use crate::root::Root;
use crate::tree::MachineId;
use qemu::Console;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// The socket's name in the machine's runtime folder.
pub(crate) const SOCKET: &str = "console.sock";

/// Serves the console until the task is aborted.
pub(crate) fn serve(id: MachineId, console: Console) -> Result<JoinHandle<()>, Problem> {
    let path = Root::runtime_folder(id).join(SOCKET);
    let failed = |e: &dyn std::fmt::Display| Problem::failed(format!("{}: {e}", path.display()));
    let listener = export::listen_unix(&path).map_err(|e| failed(&e))?;
    listener.set_nonblocking(true).map_err(|e| failed(&e))?;
    let listener = UnixListener::from_std(listener).map_err(|e| failed(&e))?;
    Ok(tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(attend(client, console.clone()));
        }
    }))
}

async fn attend(client: UnixStream, console: Console) {
    let (mut typed, mut shown) = client.into_split();
    let mut printed = console.reader();
    let show = async {
        while let Ok(Some(bytes)) = printed.next().await {
            if shown.write_all(&bytes).await.is_err() {
                break;
            }
        }
    };
    let take = async {
        let mut bytes = vec![0; 4096];
        loop {
            match typed.read(&mut bytes).await {
                // The client types no more, but may go on watching.
                Ok(0) => return std::future::pending().await,
                Ok(n) if console.write(&bytes[..n]).await.is_ok() => {}
                _ => return,
            }
        }
    };
    tokio::select! {
        () = show => {}
        () = take => {}
    }
}
