//! Path patterns with typed parameters, such as `/api/{user_id:int}/{number:float}`, as Starlette's router has them.
//!
//! A pattern matches a whole path. `{name}` is one segment or a part of one (`str`), `{name:int}`, `{name:float}` and
//! `{name:uuid}` are what they say, `{name:path}` takes slashes too; braces that hold anything else stand for themselves.
//! Of several ways to match the one counts that a regular expression would find: each value as long as the rest allows,
//! from the left. It is found in time linear in the path, whatever the pattern, so that no client can make it slow.

use crate::wire::params::{Kind, Param, put_param};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    /// What a path begins with, up to the first parameter.
    start: Vec<u8>,
    params: Vec<Variable>,
    /// How much of `start` is whole segments.
    head: usize,
}

/// A parameter and the literal text behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Variable {
    name: String,
    convertor: Convertor,
    then: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Convertor {
    Text,
    Path,
    Int,
    Float,
    Uuid,
}

/// A pattern that means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// There are `str`, `int`, `float`, `path` and `uuid`.
    #[error("unknown path convertor {0:?}")]
    Convertor(String),
    /// A name could have two values.
    #[error("path parameter {0:?} stands twice")]
    Twice(String),
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// See [`PatternError`].
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let (mut start, mut params) = (Vec::new(), Vec::<Variable>::new());
        let mut rest = text;
        while !rest.is_empty() {
            if let Some((name, kind, len)) = variable(rest) {
                if params.iter().any(|param| param.name == name) {
                    return Err(PatternError::Twice(name.to_owned()));
                }
                let convertor = Convertor::named(kind).ok_or_else(|| PatternError::Convertor(kind.to_owned()))?;
                params.push(Variable { name: name.to_owned(), convertor, then: Vec::new() });
                rest = &rest[len..];
                continue;
            }
            let len = rest.bytes().skip(1).position(|byte| byte == b'{').map_or(rest.len(), |at| at + 1);
            params.last_mut().map_or(&mut start, |param| &mut param.then).extend_from_slice(&rest.as_bytes()[..len]);
            rest = &rest[len..];
        }
        let whole = |start: &[u8]| start.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
        let head = if params.is_empty() { start.len() } else { whole(&start) };
        Ok(Self { start, params, head })
    }

    /// The length of what stands before the first parameter, in whole segments.
    pub(super) fn head(&self) -> usize {
        self.head
    }

    /// The parameters of `path`, as they travel; `path` is percent-decoded.
    pub fn matches(&self, path: &[u8]) -> Option<Vec<u8>> {
        let rest = path.strip_prefix(&self.start[..])?;
        if self.params.is_empty() {
            return rest.is_empty().then(Vec::new);
        }
        // From the right: where a value that begins at each place has to end for all that follows to match.
        let mut fits: Vec<bool> = (0..=rest.len()).map(|at| at == rest.len()).collect();
        let mut ends = Vec::with_capacity(self.params.len());
        for param in self.params.iter().rev() {
            if !param.then.is_empty() {
                let then = &param.then[..];
                fits = (0..=rest.len())
                    .map(|at| rest[at..].starts_with(then) && fits.get(at + then.len()) == Some(&true))
                    .collect();
            }
            let found = param.convertor.ends(rest, &fits);
            fits = found.iter().map(Option::is_some).collect();
            ends.push(found);
        }
        let (mut out, mut at) = (Vec::new(), 0);
        for (param, ends) in self.params.iter().zip(ends.iter().rev()) {
            let end = ends[at]? as usize;
            let kind = param.convertor.kind();
            put_param(&mut out, Param { kind, name: param.name.as_bytes(), value: &rest[at..end] });
            at = end + param.then.len();
        }
        Some(out)
    }
}

/// Name, convertor and length of the parameter that `text` begins with.
fn variable(text: &str) -> Option<(&str, &str, usize)> {
    let (inside, _) = text.strip_prefix('{')?.split_once('}')?;
    let (name, kind) = inside.split_once(':').unwrap_or((inside, "str"));
    let is_name = |text: &str| {
        text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && text.bytes().next().is_some_and(|byte| !byte.is_ascii_digit())
    };
    (is_name(name) && is_name(kind)).then_some((name, kind, inside.len() + 2))
}

impl Convertor {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "str" => Self::Text,
            "path" => Self::Path,
            "int" => Self::Int,
            "float" => Self::Float,
            "uuid" => Self::Uuid,
            _ => return None,
        })
    }

    fn kind(self) -> Kind {
        match self {
            Self::Text | Self::Path => Kind::Text,
            Self::Int => Kind::Int,
            Self::Float => Kind::Float,
            Self::Uuid => Kind::Uuid,
        }
    }

    /// For each place of `path` the furthest end, among those that `fits` allows, of a value that begins there.
    fn ends(self, path: &[u8], fits: &[bool]) -> Vec<Option<u32>> {
        match self {
            Self::Text => run(path, fits, 1, |byte| byte != b'/'),
            Self::Path => run(path, fits, 0, |byte| byte != b'\n'),
            Self::Int => run(path, fits, 1, |byte| byte.is_ascii_digit()),
            Self::Float => float(path, fits),
            Self::Uuid => {
                (0..=path.len()).map(|at| uuid(path, at).filter(|&end| fits[end]).map(|end| end as u32)).collect()
            }
        }
    }
}

/// Values of at least `least` (0 or 1) bytes of one sort.
fn run(path: &[u8], fits: &[bool], least: usize, is_of_it: impl Fn(u8) -> bool) -> Vec<Option<u32>> {
    let mut ends = vec![None; path.len() + 1];
    let mut furthest = None; // for a value that goes on to here
    for at in (0..=path.len()).rev() {
        if !path.get(at).is_some_and(|&byte| is_of_it(byte)) {
            furthest = None;
        }
        let here = fits[at].then_some(at as u32);
        let with_here = furthest.or(here);
        ends[at] = if least == 0 { with_here } else { furthest };
        furthest = with_here;
    }
    ends
}

/// Digits, then perhaps a point and digits.
fn float(path: &[u8], fits: &[bool]) -> Vec<Option<u32>> {
    let digits = run(path, fits, 1, |byte| byte.is_ascii_digit());
    let mut ends = digits.clone();
    let mut fraction = None; // the furthest end behind the point that ends this run of digits
    for at in (0..path.len()).rev() {
        match path[at] {
            b'.' => fraction = digits[at + 1],
            byte if byte.is_ascii_digit() => ends[at] = fraction.or(digits[at]),
            _ => fraction = None,
        }
    }
    ends
}

fn uuid(path: &[u8], mut at: usize) -> Option<usize> {
    for (group, digits) in [8, 4, 4, 4, 12].into_iter().enumerate() {
        if group > 0 && path.get(at) == Some(&b'-') {
            at += 1;
        }
        if !path.get(at..at + digits)?.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        at += digits;
    }
    Some(at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(params: &[u8]) -> Vec<(u8, String, String)> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("the tests' paths are text");
        let mut found = Vec::new();
        let mut rest = params;
        while let [kind, name, a, b, c, d, tail @ ..] = rest {
            let (name, tail) = tail.split_at(usize::from(*name));
            let (value, tail) = tail.split_at(u32::from_le_bytes([*a, *b, *c, *d]) as usize);
            found.push((*kind, text(name), text(value)));
            rest = tail;
        }
        found
    }

    fn values(pattern: &str, path: &str) -> Option<Vec<String>> {
        let found = Pattern::parse(pattern).expect("valid").matches(path.as_bytes())?;
        Some(read(&found).into_iter().map(|(_, _, value)| value).collect())
    }

    #[test]
    fn values_have_names_and_kinds() {
        let pattern = Pattern::parse("/api/{user_id:int}/{n:float}/{who}/{id:uuid}/{rest:path}").expect("valid");
        let path = "/api/123/3.14/é/0123456789abcdef0123456789abcdef/a/b";
        let expected = [
            (Kind::Int, "user_id", "123"),
            (Kind::Float, "n", "3.14"),
            (Kind::Text, "who", "é"),
            (Kind::Uuid, "id", "0123456789abcdef0123456789abcdef"),
            (Kind::Text, "rest", "a/b"),
        ];
        let expected = expected.map(|(kind, name, value)| (kind as u8, name.to_owned(), value.to_owned()));
        assert_eq!(read(&pattern.matches(path.as_bytes()).expect("it matches")), expected);
        assert_eq!(pattern.head(), "/api".len());
    }

    #[test]
    fn a_value_of_another_type_is_no_match() {
        for (pattern, path) in [
            ("/{n:int}", "/-1"),
            ("/{n:int}", "/1.0"),
            ("/{n:float}", "/1."),
            ("/{n:float}", "/.5"),
            ("/{name}", "/a/b"),
            ("/{name}", "/"),
            ("/{name}/", "/a"),
            ("/{id:uuid}", "/0123456789abcdef0123456789abcde"),
            ("/simple", "/simple/"),
            ("/simple", "/simpler"),
            // Before a newline at the end Starlette's `$` matches.
            ("/{n:int}", "/1\n"),
            ("/{rest:path}", "/a\n"),
            ("/simple", "/simple\n"),
        ] {
            assert_eq!(values(pattern, path), None, "{pattern} {path}");
        }
    }

    #[test]
    fn values_are_as_long_as_the_rest_allows() {
        for (pattern, path, expected) in [
            ("/{a}-{b}", "/1-2-3", vec!["1-2", "3"]),
            ("/{a:path}/{b}", "/x/y/z", vec!["x/y", "z"]),
            ("/{a:path}", "/", vec![""]),
            ("/{a:float}{b}", "/1.25", vec!["1.2", "5"]),
            ("/{a:float}.{b:int}", "/1.2.3", vec!["1.2", "3"]),
            ("/v{major:int}.{minor:int}", "/v1.22", vec!["1", "22"]),
            ("/simple", "/simple", vec![]),
            ("/{a:int}{b}", "/12\n", vec!["12", "\n"]),
            ("/{1}/{a b}", "/{1}/{a b}", vec![]),
        ] {
            assert_eq!(values(pattern, path), Some(expected.into_iter().map(str::to_owned).collect()), "{pattern}");
        }
    }

    #[test]
    fn a_pattern_without_a_meaning_is_refused() {
        assert_eq!(Pattern::parse("/{a:date}"), Err(PatternError::Convertor("date".into())));
        assert_eq!(Pattern::parse("/{a}/{a:int}"), Err(PatternError::Twice("a".into())));
    }

    /// Whether the whole text is a value, said as plainly as it can be.
    fn is_value(convertor: &str, text: &str) -> bool {
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        match convertor {
            "str" => !text.is_empty() && !text.contains('/'),
            "path" => !text.contains('\n'),
            "int" => digits(text),
            _ => text.split_once('.').map_or(digits(text), |(a, b)| digits(a) && digits(b)),
        }
    }

    /// Tries every way, the longest values first.
    fn rule(params: &[(&str, &str)], path: &str) -> Option<Vec<String>> {
        let Some(((convertor, then), others)) = params.split_first() else {
            return path.is_empty().then(Vec::new);
        };
        (0..=path.len()).rev().find_map(|end| {
            let (value, rest) = path.split_at(end);
            let rest = rest.strip_prefix(then).filter(|_| is_value(convertor, value))?;
            rule(others, rest).map(|found| std::iter::once(value.to_owned()).chain(found).collect())
        })
    }

    proptest! {
        #[test]
        fn matching_agrees_with_the_rule(
            params in prop::collection::vec(
                (prop::sample::select(vec!["str", "path", "int", "float"]), prop::sample::select(vec!["", "/", ".", "-", "1"])),
                1..4,
            ),
            path in "[/1a.-]{0,9}",
        ) {
            let each: Vec<_> =
                params.iter().enumerate().map(|(at, (kind, then))| format!("{{p{at}:{kind}}}{then}")).collect();
            let pattern = each.concat();
            prop_assert_eq!(values(&format!("/{pattern}"), &format!("/{path}")), rule(&params, &path), "{}", pattern);
        }

        #[test]
        fn nothing_panics(pattern in "[/{}:a1é]{0,12}", path in prop::collection::vec(any::<u8>(), 0..20)) {
            if let Ok(pattern) = Pattern::parse(&pattern) {
                pattern.matches(&path);
            }
        }
    }
}
