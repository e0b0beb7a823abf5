//! A client that writes raw bytes and reads HTTP/1.1 responses without a library's forgiveness.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
};

use super::PATIENCE;

pub struct Client {
    pub socket: TcpStream,
    reader: BufReader<TcpStream>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("text")
    }
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).expect("the proxy listens");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        socket.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        // Small, so that a client that does not read is noticed early.
        socket2::SockRef::from(&socket).set_recv_buffer_size(64 * 1024).expect("a buffer");
        let reader = BufReader::new(socket.try_clone().expect("a descriptor"));
        Self { socket, reader }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket.write_all(bytes.as_ref()).expect("the proxy reads");
    }

    pub fn get(&mut self, path: &str) {
        self.send(format!("GET {path} HTTP/1.1\r\nhost: h\r\n\r\n"));
    }

    pub fn post(&mut self, path: &str, body: &[u8]) {
        let head = format!("POST {path} HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n", body.len());
        // In one piece: a small body that is late does not travel in its request.
        self.send([head.as_bytes(), body].concat());
    }

    pub fn chunk(&mut self, bytes: &[u8]) {
        self.send(format!("{:x}\r\n", bytes.len()));
        self.send(bytes);
        self.send("\r\n");
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        self.reader.read_until(b'\n', &mut line).expect("a line");
        assert!(line.ends_with(b"\r\n"), "the connection ended within a line: {:?}", String::from_utf8_lossy(&line));
        line.truncate(line.len() - 2);
        line.into_iter().map(char::from).collect()
    }

    pub fn head(&mut self) -> Response {
        let line = self.line();
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.push((name.to_lowercase(), value.to_owned()));
        }
        Response { status: status.unwrap_or_else(|| panic!("no status line: {line}")), headers, body: Vec::new() }
    }

    /// The next chunk of a chunked body; empty: the last.
    pub fn next_chunk(&mut self) -> Vec<u8> {
        let size = usize::from_str_radix(&self.line(), 16).expect("a chunk size");
        let mut chunk = vec![0; size];
        self.reader.read_exact(&mut chunk).expect("a chunk");
        assert_eq!(self.line(), "");
        chunk
    }

    /// A whole response whose body is delimited.
    pub fn response(&mut self) -> Response {
        let mut response = self.head();
        if response.header("transfer-encoding") == Some("chunked") {
            loop {
                let chunk = self.next_chunk();
                if chunk.is_empty() {
                    break;
                }
                response.body.extend(chunk);
            }
        } else if let Some(length) = response.header("content-length") {
            response.body = vec![0; length.parse().expect("a length")];
            self.reader.read_exact(&mut response.body).expect("the body");
        }
        response
    }

    /// What comes until the proxy closes.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // A reset is an end too.
        let _ = self.reader.read_to_end(&mut rest);
        rest
    }

    /// The proxy has closed this connection and sent nothing more.
    pub fn is_closed(&mut self) -> bool {
        self.rest().is_empty()
    }

    pub fn hang_up(self) {
        self.socket.shutdown(Shutdown::Both).expect("an open socket");
    }
}
