//! Pickles of small plain values, written and read without Python's pickle, which costs several calls into Python for each.
//!
//! Plain are bytes, str, int, float, bool and None, and tuples, lists and dicts of them, all of their exact types. What
//! refers to one list or dict twice is not: the other side must get one, too. The first object that is not plain, or one
//! too many, leaves all of it to `values.py`. What is written is an ordinary pickle of protocol 5, but for the frame that
//! C's pickle begins with: by that its reader knows that it need not try.

use bytes::{BufMut, BytesMut};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use rayserve_dataplane::wire::LARGE;

/// Objects in one value; C's pickle is as quick for more.
const OBJECTS: usize = 256;
/// Containers within each other.
const DEPTH: usize = 16;

const PROTO: u8 = 0x80;
const STOP: u8 = b'.';
const NONE: u8 = b'N';
const TRUE: u8 = 0x88;
const FALSE: u8 = 0x89;
const BININT: u8 = b'J';
const LONG1: u8 = 0x8a;
const BINFLOAT: u8 = b'G';
const BINBYTES: u8 = b'B';
const BINUNICODE: u8 = b'X';
const MARK: u8 = b'(';
const TUPLE: u8 = b't';
const TUPLE2: u8 = 0x86;
const EMPTY_LIST: u8 = b']';
const APPENDS: u8 = b'e';
const EMPTY_DICT: u8 = b'}';
const SETITEMS: u8 = b'u';

/// Appends the pickle of one value; `false`, and nothing appended: it is not plain.
pub(crate) fn put(out: &mut BytesMut, value: &Bound<'_, PyAny>) -> bool {
    Writer::write(out, |writer| writer.put(value, 0))
}

/// Appends the pickle of the pair of a call's arguments; `false`, and nothing appended: one is not plain.
pub(crate) fn put_arguments(out: &mut BytesMut, args: &Bound<'_, PyTuple>, kwargs: &Bound<'_, PyDict>) -> bool {
    Writer::write(out, |writer| {
        writer.put_tuple(args, 0)?;
        writer.put_dict(kwargs, 0)?;
        writer.out.put_u8(TUPLE2);
        Some(())
    })
}

struct Writer<'a> {
    out: &'a mut BytesMut,
    start: usize,
    objects: usize,
    /// The lists and dicts so far, by their addresses.
    met: Vec<usize>,
}

impl Writer<'_> {
    fn write(out: &mut BytesMut, put: impl FnOnce(&mut Writer<'_>) -> Option<()>) -> bool {
        let start = out.len();
        out.put_slice(&[PROTO, 5]);
        if put(&mut Writer { out: &mut *out, start, objects: 0, met: Vec::new() }).is_none() {
            out.truncate(start);
            return false;
        }
        out.put_u8(STOP);
        true
    }

    fn put(&mut self, value: &Bound<'_, PyAny>, depth: usize) -> Option<()> {
        self.objects += 1;
        if self.objects > OBJECTS {
            return None;
        }
        if let Ok(bytes) = value.cast_exact::<PyBytes>() {
            return self.put_text(BINBYTES, bytes.as_bytes());
        }
        if let Ok(text) = value.cast_exact::<PyString>() {
            return self.put_text(BINUNICODE, text.to_str().ok()?.as_bytes()); // lone surrogates are Python's to encode
        }
        if value.is_none() {
            self.out.put_u8(NONE);
        } else if let Ok(number) = value.cast_exact::<PyInt>() {
            let number: i64 = number.extract().ok()?;
            if let Ok(short) = i32::try_from(number) {
                self.out.put_u8(BININT);
                self.out.put_i32_le(short);
            } else {
                self.out.put_slice(&[LONG1, 8]);
                self.out.put_i64_le(number);
            }
        } else if let Ok(number) = value.cast_exact::<PyFloat>() {
            self.out.put_u8(BINFLOAT);
            self.out.put_f64(number.value());
        } else if let Ok(truth) = value.cast_exact::<PyBool>() {
            self.out.put_u8(if truth.is_true() { TRUE } else { FALSE });
        } else if let Ok(list) = value.cast_exact::<PyList>() {
            self.meet(value)?;
            self.out.put_slice(&[EMPTY_LIST, MARK]);
            for item in list.iter() {
                self.put(&item, deeper(depth)?)?;
            }
            self.out.put_u8(APPENDS);
        } else if let Ok(dict) = value.cast_exact::<PyDict>() {
            self.meet(value)?;
            self.put_dict(dict, depth)?;
        } else {
            self.put_tuple(value.cast_exact::<PyTuple>().ok()?, depth)?;
        }
        Some(())
    }

    fn put_tuple(&mut self, tuple: &Bound<'_, PyTuple>, depth: usize) -> Option<()> {
        self.out.put_u8(MARK);
        for item in tuple.iter_borrowed() {
            self.put(&item, deeper(depth)?)?;
        }
        self.out.put_u8(TUPLE);
        Some(())
    }

    fn put_dict(&mut self, dict: &Bound<'_, PyDict>, depth: usize) -> Option<()> {
        self.out.put_slice(&[EMPTY_DICT, MARK]);
        for (key, item) in dict.iter() {
            self.put(&key, deeper(depth)?)?;
            self.put(&item, deeper(depth)?)?;
        }
        self.out.put_u8(SETITEMS);
        Some(())
    }

    /// A large value is not copied on its way, but stays where Python's pickle has written it.
    fn put_text(&mut self, kind: u8, text: &[u8]) -> Option<()> {
        if self.out.len() - self.start + text.len() >= LARGE {
            return None;
        }
        self.out.reserve(text.len() + 64);
        self.out.put_u8(kind);
        self.out.put_u32_le(text.len() as u32);
        self.out.put_slice(text);
        Some(())
    }

    /// None: the container has been there before.
    fn meet(&mut self, container: &Bound<'_, PyAny>) -> Option<()> {
        let address = container.as_ptr().addr();
        (!self.met.contains(&address)).then(|| self.met.push(address))
    }
}

fn deeper(depth: usize) -> Option<usize> {
    (depth < DEPTH).then_some(depth + 1)
}

/// The value of a pickle that [`put`] has written; None: somebody else has.
pub(crate) fn read<'py>(py: Python<'py>, pickle: &[u8]) -> Option<Bound<'py, PyAny>> {
    let mut reader = Reader { py, rest: pickle.strip_prefix(&[PROTO, 5])? };
    let value = reader.value(0)?;
    (reader.rest == [STOP]).then_some(value)
}

/// The arguments of a pickle that [`put_arguments`] has written; None: somebody else has.
pub(crate) fn read_arguments<'py>(py: Python<'py>, pickle: &[u8]) -> Option<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
    let mut reader = Reader { py, rest: pickle.strip_prefix(&[PROTO, 5])? };
    let (args, kwargs) = (reader.value(0)?, reader.value(0)?);
    (reader.rest == [TUPLE2, STOP]).then_some(())?;
    Some((args.cast_into().ok()?, kwargs.cast_into().ok()?))
}

struct Reader<'py, 'a> {
    py: Python<'py>,
    rest: &'a [u8],
}

impl<'py> Reader<'py, '_> {
    fn value(&mut self, depth: usize) -> Option<Bound<'py, PyAny>> {
        let py = self.py;
        let [kind] = self.array()?;
        Some(match kind {
            NONE => py.None().into_bound(py),
            TRUE | FALSE => PyBool::new(py, kind == TRUE).to_owned().into_any(),
            BININT => i32::from_le_bytes(self.array()?).into_pyobject(py).ok()?.into_any(),
            LONG1 => {
                let ([8], number) = (self.array()?, self.array()?) else { return None };
                i64::from_le_bytes(number).into_pyobject(py).ok()?.into_any()
            }
            BINFLOAT => PyFloat::new(py, f64::from_be_bytes(self.array()?)).into_any(),
            BINBYTES => PyBytes::new(py, self.text()?).into_any(),
            BINUNICODE => PyString::from_bytes(py, self.text()?).ok()?.into_any(),
            MARK => PyTuple::new(py, self.items(TUPLE, depth)?).ok()?.into_any(),
            EMPTY_LIST => {
                ([MARK] == self.array()?).then_some(())?;
                PyList::new(py, self.items(APPENDS, depth)?).ok()?.into_any()
            }
            EMPTY_DICT => {
                ([MARK] == self.array()?).then_some(())?;
                let dict = PyDict::new(py);
                while !self.ends(SETITEMS)? {
                    let key = self.value(deeper(depth)?)?;
                    dict.set_item(key, self.value(deeper(depth)?)?).ok()?;
                }
                dict.into_any()
            }
            _ => return None,
        })
    }

    fn items(&mut self, end: u8, depth: usize) -> Option<Vec<Bound<'py, PyAny>>> {
        let mut items = Vec::new();
        while !self.ends(end)? {
            items.push(self.value(deeper(depth)?)?);
        }
        Some(items)
    }

    fn ends(&mut self, end: u8) -> Option<bool> {
        let (&next, after) = self.rest.split_first()?;
        if next == end {
            self.rest = after;
        }
        Some(next == end)
    }

    fn text(&mut self) -> Option<&[u8]> {
        let len = u32::from_le_bytes(self.array()?) as usize;
        let (text, after) = self.rest.split_at_checked(len)?;
        self.rest = after;
        Some(text)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, after) = self.rest.split_first_chunk()?;
        self.rest = after;
        Some(*array)
    }
}
