//! The command line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::operation::Kind;

/// What `--help` prints.
pub const USAGE: &str = "usage: fs3-fsx FILE [options]
Random operations on FILE, which is made anew, compared with a model in memory after each.

  --ops N          how many operations (default 10000)
  --seed S         what they follow from (default: the time)
  --length BYTES   the file grows to this at most (default 1048576)
  --oplen BYTES    one operation touches this at most (default 65536)
  --second FILE    the same file through another mount: the two take turns, close-to-open
  --jobs N         that many processes, each with a file of its own (FILE.0, FILE.1, …) and a seed of its own
  --shared         with --jobs: all in one file, each in a part of it; the borders lie inside pages
  --without KINDS  leave out operations, separated by commas: zero,directwrite
  --replay LOG     do what LOG says instead of choosing
  --shrink         after a failure look for a short sequence that fails, too (at most two minutes)
  --log FILE       where the operations are kept after a failure (default: in the directory for temporary files)

Exit status: 0 all agreed, 1 a difference or an error, 2 bad arguments.";

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file.
    pub path: PathBuf,
    /// The same file elsewhere.
    pub second: Option<PathBuf>,
    /// Operations to do.
    pub ops: u64,
    /// What they follow from.
    pub seed: u64,
    /// Most bytes of the file; with `shared`, of each part.
    pub length: u64,
    /// Most bytes of one operation.
    pub oplen: u64,
    /// Processes.
    pub jobs: u64,
    /// Which of the processes this is, once it is one of several.
    pub job: Option<u64>,
    /// All processes use one file.
    pub shared: bool,
    pub(crate) without: Vec<Kind>,
    /// Operations to do instead of random ones.
    pub replay: Option<PathBuf>,
    /// Look for a shorter sequence that fails.
    pub shrink: bool,
    /// Where operations are kept after a failure.
    pub log: Option<PathBuf>,
}

impl Options {
    /// Read the arguments, without the program's name; `seed`: what to use when none is given. Errors say what is wrong.
    pub fn parse(arguments: &[String], seed: u64) -> Result<Self, String> {
        let mut options = Self {
            path: PathBuf::new(),
            second: None,
            ops: 10_000,
            seed,
            length: 1 << 20,
            oplen: 1 << 16,
            jobs: 1,
            job: None,
            shared: false,
            without: Vec::new(),
            replay: None,
            shrink: false,
            log: None,
        };
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
            match word.as_str() {
                "--ops" => options.ops = number(value()?)?,
                "--seed" => options.seed = number(value()?)?,
                "--length" => options.length = number(value()?)?,
                "--oplen" => options.oplen = number(value()?)?,
                "--jobs" => options.jobs = number(value()?)?,
                "--job" => options.job = Some(number(value()?)?),
                "--second" => options.second = Some(value()?.into()),
                "--replay" => options.replay = Some(value()?.into()),
                "--log" => options.log = Some(value()?.into()),
                "--without" => options.without = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
                "--shared" => options.shared = true,
                "--shrink" => options.shrink = true,
                word if !word.starts_with('-') && options.path.as_os_str().is_empty() => options.path = word.into(),
                word => return Err(format!("{word} is not understood")),
            }
        }
        options.check()
    }

    fn check(self) -> Result<Self, String> {
        let several = self.jobs > 1;
        let wrong = [
            (self.path.as_os_str().is_empty(), "FILE is missing"),
            (self.jobs == 0, "--jobs is at least 1"),
            (self.length < 16 << 10 || self.oplen < 4 << 10, "--length is at least 16384, --oplen at least 4096"),
            (self.shared && !several && self.job.is_none(), "--shared needs --jobs"),
            (self.shared && self.second.is_some(), "--shared and --second do not go together"),
            (several && self.replay.is_some(), "--replay is for one process"),
        ];
        match wrong.iter().find(|(is_so, _)| *is_so) {
            Some((_, message)) => Err((*message).into()),
            None => Ok(self),
        }
    }
}

/// `path` with `.ending` behind its name.
pub(crate) fn added(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".");
    name.push(ending);
    name.into()
}

fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|e| format!("{word:?}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        Options::parse(&line.split_whitespace().map(String::from).collect::<Vec<_>>(), 7)
    }

    #[test]
    fn arguments_are_read_and_bad_ones_refused_with_a_reason() {
        let options = parse("/m/f --ops 5 --without zero,copy --second /n/f --shrink").unwrap();
        assert_eq!((options.ops, options.seed, options.without), (5, 7, vec![Kind::Zero, Kind::Copy]));
        for (line, reason) in [
            ("", "FILE is missing"),
            ("f --ops", "--ops needs a value"),
            ("f --ops x", "invalid digit"),
            ("f --without zeros", "no operation"),
            ("f --shared", "needs --jobs"),
            ("f g", "g is not understood"),
        ] {
            assert!(parse(line).unwrap_err().contains(reason), "{line}");
        }
    }
}
