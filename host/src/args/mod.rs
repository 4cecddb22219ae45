//! From what was written on the command line to what commands are given: files of flags, other tools' names, and the groups of
//! flags that several commands share.

mod config;
pub(crate) mod data;
mod flag;
pub(crate) mod lora;
pub(crate) mod loss;
pub(crate) mod model;
pub mod peers;
pub(crate) mod report;
pub(crate) mod resolve;
pub(crate) mod sampling;
pub(crate) mod start;
pub(crate) mod storage;
pub(crate) mod train;
mod yaml;

use std::fmt;
use std::str::FromStr;

use clap::ArgMatches;
use clap::parser::ValueSource;
use dpo_core::error::{Error, Result};
use dpo_core::lora::MOST_ALPHA;
use serde::Serialize;
use serde_json::Value;

/// A setting that follows from others unless it is given: `auto` or a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Auto<T>(pub(crate) Option<T>);

impl<T: FromStr> FromStr for Auto<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> std::result::Result<Auto<T>, T::Err> {
        if text == "auto" { Ok(Auto(None)) } else { Ok(Auto(Some(text.parse()?))) }
    }
}

impl<T: fmt::Display> fmt::Display for Auto<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("auto"),
        }
    }
}

impl<T: Serialize> Serialize for Auto<T> {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        match &self.0 {
            Some(value) => value.serialize(to),
            None => to.serialize_str("auto"),
        }
    }
}

/// Which device computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum DeviceArg {
    /// The first GPU that can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// GPUs: those of these indices, one for each process of this machine; without any, by the processes' local rank.
    Cuda(Vec<usize>),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<DeviceArg, String> {
        let wrong = || format!("'{text}' should be auto, cpu, cuda or cuda:N, several GPUs as cuda:N,M");
        match text {
            "auto" => Ok(DeviceArg::Auto),
            "cpu" => Ok(DeviceArg::Cpu),
            "cuda" => Ok(DeviceArg::Cuda(Vec::new())),
            _ => {
                let list = text.strip_prefix("cuda:").ok_or_else(wrong)?;
                let indices = list.split(',').map(|n| n.parse().map_err(|_| wrong()));
                Ok(DeviceArg::Cuda(indices.collect::<std::result::Result<_, _>>()?))
            }
        }
    }
}

impl fmt::Display for DeviceArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceArg::Auto => f.write_str("auto"),
            DeviceArg::Cpu => f.write_str("cpu"),
            DeviceArg::Cuda(list) if list.is_empty() => f.write_str("cuda"),
            DeviceArg::Cuda(list) => {
                let list: Vec<String> = list.iter().map(usize::to_string).collect();
                write!(f, "cuda:{}", list.join(","))
            }
        }
    }
}

/// Whose kernels a GPU runs, by the name of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KernelsArg(pub u32);

impl FromStr for KernelsArg {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<KernelsArg, String> {
        let known = dpo_cuda::kernels::ARCHITECTURES;
        let named = text.strip_prefix("sm_").and_then(|n| n.parse().ok()).filter(|n| known.contains(n));
        named.map(KernelsArg).ok_or_else(|| {
            let all: Vec<String> = known.iter().map(|n| format!("sm_{n}")).collect();
            format!("'{text}' should be one of {}", all.join(", "))
        })
    }
}

impl Serialize for DeviceArg {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.serialize_str(&self.to_string())
    }
}

/// Bytes, such as `24GiB`; recorded as they were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SizeArg {
    text: String,
    /// The number of bytes.
    pub(crate) bytes: usize,
}

impl FromStr for SizeArg {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<SizeArg, String> {
        let bytes = dpo_core::memory::parse_size(text)
            .map_err(|e| format!("{}: {}", e.message(), e.advice().unwrap_or_default()))?;
        Ok(SizeArg { text: text.to_owned(), bytes })
    }
}

impl Serialize for SizeArg {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.serialize_str(&self.text)
    }
}

/// Numbers that make sense, and how to say so.
pub(crate) type Range = (fn(f64) -> bool, &'static str);
pub(crate) const ANY: Range = (|_| true, "a finite number");
pub(crate) const FROM_0: Range = (|x| x >= 0.0, "0 or more");
pub(crate) const ABOVE_0: Range = (|x| x > 0.0, "above 0");
pub(crate) const ALPHA: Range = (|x| x > 0.0 && x <= MOST_ALPHA, "above 0 and up to 1e12");
pub(crate) const MINUTES: Range = (|x| x > 0.0 && x <= 1e6, "above 0 and up to 1e6");
pub(crate) const SHARE: Range = (|x| (0.0..=1.0).contains(&x), "from 0 to 1");
pub(crate) const BELOW_HALF: Range = (|x| (0.0..0.5).contains(&x), "from 0 to below 0.5: at more, labels turn round");
pub(crate) const BELOW_1: Range = (|x| (0.0..1.0).contains(&x), "from 0 to below 1");

/// Refuses numbers of which nothing could make sense: flags with their numbers, the range in which these make sense, and what
/// is usual.
pub(crate) fn refuse_out_of_range(numbers: &[(&str, Option<f64>, Range, &str)]) -> Result<()> {
    for (flag, number, (within, range), help) in numbers {
        if let Some(x) = number.filter(|x| !x.is_finite() || !within(*x)) {
            return Err(Error::input(format!("should be {range}, not {x}")).at(flag).help(*help));
        }
    }
    Ok(())
}

/// The fields of flags that were given.
pub(crate) fn given(matches: &ArgMatches) -> Vec<String> {
    let given = |id: &&str| matches.value_source(id) == Some(ValueSource::CommandLine);
    matches.ids().map(|id| id.as_str()).filter(given).map(str::to_owned).collect()
}

/// Every flag of some arguments with its value, by name.
pub(crate) fn record(args: &impl Serialize) -> serde_json::Map<String, Value> {
    match serde_json::json!(args) {
        Value::Object(flags) => flags,
        _ => serde_json::Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_written_as_they_are_read() {
        for text in ["auto", "cpu", "cuda", "cuda:1", "cuda:2,3"] {
            assert_eq!(text.parse::<DeviceArg>().unwrap().to_string(), text);
        }
        for text in ["gpu", "cuda:", "cuda:x", "cuda1"] {
            assert!(text.parse::<DeviceArg>().unwrap_err().contains("should be auto, cpu"), "{text}");
        }
    }

    #[test]
    fn auto_is_no_value() {
        assert_eq!("auto".parse(), Ok(Auto::<usize>(None)));
        assert_eq!("7".parse(), Ok(Auto(Some(7))));
        assert!("seven".parse::<Auto<usize>>().is_err());
        assert_eq!(serde_json::json!([Auto(Some(true)), Auto::<bool>(None)]), serde_json::json!([true, "auto"]));
    }
}
