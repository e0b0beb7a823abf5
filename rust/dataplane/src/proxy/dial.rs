//! How a link gets its socket: the nearest of the replica's addresses, then the handshake, all in a bounded time.
//!
//! A socket is handed on only when both ends have proven that they know the token and the replica is the one that was meant.

use std::{io, time::Duration};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::timeout,
};

use super::config::Config;
use crate::{
    snapshot, tcp,
    wire::{
        Decoder, WireError,
        hello::{Caller, HelloError, MAX_HELLO, Role, Step},
    },
};

const HELLO_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) type Reader = Box<dyn AsyncRead + Unpin>;
pub(super) type Writer = Box<dyn AsyncWrite + Unpin>;

/// Why a link was not opened, or ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Down {
    #[error("replica closed the link")]
    Eof,
    #[error("socket failed")]
    Io(#[from] io::Error),
    #[error("peer broke the protocol")]
    Wire(#[from] WireError),
    #[error("handshake failed")]
    Hello(#[from] HelloError),
    #[error("peer was silent for too long")]
    Slow(#[from] tokio::time::error::Elapsed),
    #[error("replica has no address that this node reaches")]
    Unreachable,
    #[error("replica left and its last stream has ended")]
    Left,
}

/// A socket to the replica at `address`, which has shown that it is that replica; its limit, and what was read of more.
pub(super) async fn dial(
    address: &snapshot::Replica,
    config: &Config,
) -> Result<(Reader, Writer, u32, BytesMut), Down> {
    timeout(HELLO_TIMEOUT, shake_hands(address, config)).await?
}

async fn shake_hands(address: &snapshot::Replica, config: &Config) -> Result<(Reader, Writer, u32, BytesMut), Down> {
    let (mut reader, mut writer): (Reader, Writer) = match (&address.unix, &address.tcp) {
        (Some(path), _) if address.node_id == config.node_id => {
            let socket = UnixStream::connect(path).await?;
            tcp::widen(&socket)?;
            let (reader, writer) = socket.into_split();
            (Box::new(reader), Box::new(writer))
        }
        (_, Some(address)) => {
            let socket = TcpStream::connect(address).await?;
            tcp::prepare(&socket)?;
            let (reader, writer) = socket.into_split();
            (Box::new(reader), Box::new(writer))
        }
        _ => return Err(Down::Unreachable),
    };
    let (mut out, mut buf, mut decoder) = (BytesMut::new(), BytesMut::new(), Decoder::new(MAX_HELLO));
    let mut caller = Caller::start(&config.token, Role::Proxy, &address.id, &mut out);
    loop {
        writer.write_all_buf(&mut out).await?;
        let frame = loop {
            match decoder.next(&mut buf)? {
                Some(frame) => break frame,
                None if reader.read_buf(&mut buf).await? == 0 => return Err(Down::Eof),
                None => {}
            }
        };
        if let Step::Done(max_ongoing) = caller.feed(&frame, &mut out)? {
            return Ok((reader, writer, max_ongoing, buf));
        }
    }
}
