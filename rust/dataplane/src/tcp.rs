//! What every link needs of its socket, on both sides.
//!
//! Over TCP, a node that vanishes sends no end of file. Without these options its peers would keep requests, slots and credits for it
//! until the kernel gives up retransmitting, a quarter of an hour later.

use std::{io, os::fd::AsFd, time::Duration};

use socket2::{SockRef, TcpKeepalive};

/// While nothing is on its way.
const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(5)).with_interval(Duration::from_secs(2)).with_retries(3);
/// While something is, when no probes are sent. Longer than user code usually holds a replica's loop, which then reads nothing.
#[cfg(target_os = "linux")]
const PATIENCE_MS: u32 = 30_000;

/// Sends frames without delay, and ends the link when its peer's node has been silent for long.
///
/// # Errors
/// The system refuses an option.
pub fn prepare(socket: &impl AsFd) -> io::Result<()> {
    let options = SockRef::from(socket);
    // Frames are coalesced before they are written; Nagle would only delay them.
    options.set_tcp_nodelay(true)?;
    options.set_tcp_keepalive(&KEEPALIVE)?;
    #[cfg(target_os = "linux")]
    rustix::net::sockopt::set_tcp_user_timeout(socket, PATIENCE_MS)?;
    Ok(())
}

/// Room for bytes under way on a Unix socket. In the system's default, a fifth of a MiB, two processes that move a large
/// body wait for each other six times a MiB; in this one, of which Linux makes twice as much, less than once.
const SEND_BUFFER: usize = 512 * 1024;

/// Lets a Unix socket take more bytes before its reader has to run.
///
/// # Errors
/// The system refuses the option; it may grant less than it is asked for.
pub fn widen(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_send_buffer_size(SEND_BUFFER)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::unix::net::UnixStream,
    };

    use super::*;

    #[test]
    fn both_ends_of_a_link_notice_that_the_other_has_vanished() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let caller = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
        let (replica, _) = listener.accept().expect("connected");
        for socket in [&caller, &replica] {
            prepare(socket).expect("options that the system knows");
            let options = SockRef::from(socket);
            assert!(options.tcp_nodelay().expect("known") && options.keepalive().expect("known"));
            #[cfg(target_os = "linux")]
            assert_eq!(rustix::net::sockopt::tcp_user_timeout(socket).expect("known"), PATIENCE_MS);
        }
    }

    #[test]
    fn a_unix_socket_takes_more_than_the_system_lets_it() {
        let (socket, _peer) = UnixStream::pair().expect("two descriptors");
        let before = SockRef::from(&socket).send_buffer_size().expect("known");
        widen(&socket).expect("an option that the system knows");
        assert!(SockRef::from(&socket).send_buffer_size().expect("known") > before);
    }
}
