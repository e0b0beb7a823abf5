//! Arbitrary bytes as a peer's: frames in any split, then every payload as everything that it could be.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use rayserve_dataplane::wire::{CallView, Decoder, RequestHeadView, ResponseHeadView, hello::Callee};

fuzz_target!(|data: &[u8]| {
    let Some((&step, bytes)) = data.split_first() else { return };
    let (mut decoder, mut buf) = (Decoder::new(64 * 1024), BytesMut::new());
    let mut callee = Callee::default();
    for part in bytes.chunks(usize::from(step).max(1)) {
        buf.extend_from_slice(part);
        loop {
            match decoder.next(&mut buf) {
                Ok(Some(frame)) => {
                    let _ = callee.feed(&frame, b"token", "replica", 5, &mut BytesMut::new());
                    if let Ok(view) = RequestHeadView::parse(frame.payload.clone()) {
                        assert_eq!(view.headers().count(), view.header_count());
                        let _ = (view.method(), view.path(), view.query(), view.params().count(), view.body());
                    }
                    if let Ok(view) = ResponseHeadView::parse(frame.payload.clone()) {
                        assert_eq!(view.headers().count(), view.header_count());
                    }
                    let _ = rayserve_dataplane::wire::models::models(&frame.payload);
                    let _ = CallView::parse(frame.payload);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
