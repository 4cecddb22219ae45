//! Model families: from a checkpoint's `config.json` to a graph.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::graph::ModelGraph;
use crate::{Error, Result, bail};

/// Largest whole number of a config.
const LARGEST: u64 = i32::MAX as u64;
/// Most layers of a model; published ones have up to some hundred.
const MOST_LAYERS: usize = 4096;

/// A family of checkpoints that share their arithmetic.
pub trait ModelFamily: Send + Sync + 'static {
    /// What `--plugin` takes and `dpo-host list` prints, such as `qwen2`.
    fn name(&self) -> &'static str;

    /// One line for `dpo-host list`.
    fn summary(&self) -> &'static str;

    /// Entries of `architectures` in `config.json` that this family answers for, such as `Qwen2ForCausalLM`.
    fn claims(&self) -> &'static [&'static str];

    /// The graph for this checkpoint. Called once before a run.
    fn graph(&self, config: &Config) -> Result<ModelGraph>;

    /// A `config.json` of a published checkpoint, for `describe` and for the family's own tests.
    fn example_config(&self) -> &'static str;

    /// A jinja chat template for checkpoints that bring none.
    fn chat_template(&self) -> Option<&'static str> {
        None
    }
}

/// A checkpoint's `config.json`. It remembers which keys were asked for, so that the host can refuse those that nobody
/// understood.
#[derive(Debug)]
pub struct Config {
    keys: Map<String, Value>,
    /// `rope_parameters.` and the like, put before names in errors.
    path: String,
    read: RefCell<BTreeSet<String>>,
}

impl Config {
    /// Parses the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Config> {
        match serde_json::from_str(text) {
            Ok(Value::Object(keys)) => Ok(Config::from_map(keys, String::new())),
            Ok(_) => bail!("config.json is not an object"),
            Err(e) => bail!("config.json: {e}"),
        }
    }

    fn from_map(keys: Map<String, Value>, path: String) -> Config {
        Config { keys, path, read: RefCell::default() }
    }

    /// The value of a key; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.keys.get(key).filter(|v| !v.is_null())
    }

    /// A whole number that must be there.
    pub fn int(&self, key: &str) -> Result<usize> {
        self.opt_int(key)?.ok_or_else(|| self.missing(key))
    }

    /// A whole number, if there. No size of a model is above 2³¹ - 1; products of two such sizes do not overflow.
    pub fn opt_int(&self, key: &str) -> Result<Option<usize>> {
        let sized = |v: &Value| v.as_u64().filter(|n| *n <= LARGEST).map(|n| n as usize);
        self.typed(key, "a whole number below 2^31", sized)
    }

    /// A size that must be there: a whole number above 0.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.opt_size(key)?.ok_or_else(|| self.missing(key))
    }

    /// A size, if there: a whole number above 0.
    pub fn opt_size(&self, key: &str) -> Result<Option<usize>> {
        match self.opt_int(key)? {
            Some(0) => bail!("config.json: '{}{key}' should be above 0", self.path),
            size => Ok(size),
        }
    }

    /// `num_hidden_layers`, which must be there.
    pub fn layers(&self) -> Result<usize> {
        match self.int("num_hidden_layers")? {
            layers @ 1..=MOST_LAYERS => Ok(layers),
            other => bail!("config.json: num_hidden_layers is {other}; models of 1 to {MOST_LAYERS} layers are read"),
        }
    }

    /// A number that must be there.
    pub fn float(&self, key: &str) -> Result<f64> {
        self.opt_float(key)?.ok_or_else(|| self.missing(key))
    }

    /// A number, if there.
    pub fn opt_float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// `true` or `false`; `default` where absent.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// A text, if there.
    pub fn opt_text(&self, key: &str) -> Result<Option<String>> {
        self.typed(key, "a text", |v| v.as_str().map(str::to_owned))
    }

    /// A list of texts, if there.
    pub fn opt_texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.typed(key, "a list of texts", |v| v.as_array()?.iter().map(|t| t.as_str().map(str::to_owned)).collect())
    }

    /// A nested object, if there. The reader of it must call [`refuse_unread`](Config::refuse_unread).
    pub fn opt_object(&self, key: &str) -> Result<Option<Config>> {
        let map = self.typed(key, "an object", |v| v.as_object().cloned())?;
        Ok(map.map(|m| Config::from_map(m, format!("{}{key}.", self.path))))
    }

    /// The output projection's tensor: the embedding where `tie_word_embeddings` says so, else `lm_head.weight`.
    pub fn head_tensor<'a>(&self, embedding: &'a str, tied_by_default: bool) -> Result<&'a str> {
        Ok(if self.flag("tie_word_embeddings", tied_by_default)? { embedding } else { "lm_head.weight" })
    }

    /// The attention window of every layer, as Qwen2 and its kin state it: `layer_types` in files of transformers 5, else
    /// the layers from `max_window_layers` on; and only where `use_sliding_window` is true.
    pub fn layer_windows(&self, layers: usize) -> Result<Vec<Option<usize>>> {
        let used = self.flag("use_sliding_window", false)?;
        let window = self.opt_int("sliding_window")?.filter(|_| used);
        let first = self.opt_int("max_window_layers")?.unwrap_or(layers);
        let Some(types) = self.opt_texts("layer_types")? else {
            return Ok((0..layers).map(|i| window.filter(|_| i >= first)).collect());
        };
        if types.len() != layers {
            return bail!("config.json: {} layer_types for {layers} layers", types.len());
        }
        let one = |kind: &String| match (kind.as_str(), window) {
            ("full_attention", _) => Ok(None),
            ("sliding_attention", Some(window)) => Ok(Some(window)),
            ("sliding_attention", None) => {
                bail!("config.json: a layer is of sliding_attention, but sliding_window is not set")
            }
            (other, _) => bail!("config.json: layer type '{other}' is not supported by this family"),
        };
        types.iter().map(one).collect()
    }

    /// Keys with a value that were never asked for.
    pub fn unread(&self) -> Vec<String> {
        let read = self.read.borrow();
        let unread = self.keys.iter().filter(|(k, v)| !v.is_null() && !read.contains(*k));
        unread.map(|(k, _)| format!("{}{k}", self.path)).collect()
    }

    /// An error where a key was never asked for.
    pub fn refuse_unread(&self) -> Result<()> {
        match self.unread().first() {
            Some(key) => bail!("config.json: key '{key}' is not understood"),
            None => Ok(()),
        }
    }

    fn typed<T>(&self, key: &str, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(typed) => Ok(Some(typed)),
            None => bail!("config.json: '{}{key}' should be {kind}, is {value}", self.path),
        }
    }

    fn missing(&self, key: &str) -> Error {
        Error::new(format!("config.json: key '{}{key}' is missing", self.path))
    }
}
