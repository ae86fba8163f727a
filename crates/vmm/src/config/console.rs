//! A virtio console in words: `stdio`, `null`, `file=PATH` or `socket=PATH`, each but the first with `,name=NAME`.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most bytes of a port's name.
const NAME_LEN: usize = 64;

/// Where a virtio console or port leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleEnd {
    /// To the standard input and output of the program.
    Stdio,
    /// Nowhere.
    Null,
    /// Output goes to this file.
    File(PathBuf),
    /// To whoever connects to the Unix socket that is made here.
    Socket(PathBuf),
}

/// A virtio console, or a port of which its programs know the name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleConfig {
    /// Where it leads.
    pub end: ConsoleEnd,
    /// Its name, by which it is a port; without one it is a console.
    pub name: Option<String>,
}

impl ConsoleConfig {
    /// Whether it leads to the program's standard input and output.
    pub fn is_stdio(&self) -> bool {
        self.end == ConsoleEnd::Stdio
    }
}

impl FromStr for ConsoleConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (end, name) = match text.split_once(",name=") {
            Some((end, name)) => (end, Some(checked_name(name)?)),
            None => (text, None),
        };
        let end = match (end, end.split_once('=')) {
            ("stdio", _) if name.is_none() => ConsoleEnd::Stdio,
            ("null", _) => ConsoleEnd::Null,
            (_, Some(("file", path))) if !path.is_empty() => ConsoleEnd::File(path.into()),
            (_, Some(("socket", path))) if !path.is_empty() => ConsoleEnd::Socket(path.into()),
            _ => {
                return Err(
                    "expected stdio, or null, file=PATH or socket=PATH, and ,name=NAME for a port".into()
                );
            }
        };
        Ok(Self { end, name })
    }
}

fn checked_name(text: &str) -> Result<String, String> {
    let fits = text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    match fits && (1..=NAME_LEN).contains(&text.len()) {
        true => Ok(text.to_owned()),
        false => Err(format!("name: expected 1 to {NAME_LEN} printable characters without a slash")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood() {
        let parse = |text: &str| text.parse::<ConsoleConfig>();
        let config = |end, name: Option<&str>| Ok(ConsoleConfig { end, name: name.map(String::from) });
        assert_eq!(parse("stdio"), config(ConsoleEnd::Stdio, None));
        assert_eq!(parse("null,name=a.b"), config(ConsoleEnd::Null, Some("a.b")));
        assert_eq!(parse("file=/a,b"), config(ConsoleEnd::File("/a,b".into()), None));
        assert_eq!(parse("socket=s,name=x"), config(ConsoleEnd::Socket("s".into()), Some("x")));
        for bad in
            ["", "stdio,name=x", "tty", "file=", "socket=", "null,name=", "null,name=a/b", "null,name=a b"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
