//! What every link over TCP needs of its socket, on both sides; Unix sockets need nothing.
//!
//! A node that vanishes sends no end of file. Without these options its peers would keep requests, slots and credits for it
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

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

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
}
