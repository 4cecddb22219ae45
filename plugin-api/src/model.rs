//! Model families: from a checkpoint's `config.json` to a graph.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

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

    /// Published checkpoints that this family is known to read, by their names on a hub, such as `Qwen/Qwen2.5-7B-Instruct`.
    fn checkpoints(&self) -> &'static [&'static str] {
        &[]
    }

    /// The graph for this checkpoint. Called once before a run.
    fn graph(&self, config: &Config) -> Result<ModelGraph>;

    /// A `config.json` of a published checkpoint, for `describe` and for the family's own tests.
    fn example_config(&self) -> &'static str;

    /// A jinja chat template for checkpoints that bring none.
    fn chat_template(&self) -> Option<&'static str> {
        None
    }
}

/// A family as data, for a crate that has several: a row of its table. A plugin names it as `&FAMILY`.
pub struct Family {
    /// What [`ModelFamily::name`] says, and so on.
    pub name: &'static str,
    /// What it is in a line.
    pub summary: &'static str,
    /// Architectures of `config.json` that it reads.
    pub claims: &'static [&'static str],
    /// Published checkpoints.
    pub checkpoints: &'static [&'static str],
    /// A published config.
    pub example_config: &'static str,
    /// From a config to its graph.
    pub graph: fn(&Config) -> Result<ModelGraph>,
}

impl ModelFamily for &'static Family {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn claims(&self) -> &'static [&'static str] {
        self.claims
    }

    fn checkpoints(&self) -> &'static [&'static str] {
        self.checkpoints
    }

    fn example_config(&self) -> &'static str {
        self.example_config
    }

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        (self.graph)(config)
    }
}

/// A checkpoint's `config.json`, or an object in it. All objects of a file remember together which keys were asked for, so that
/// the host can judge those that nobody understood.
#[derive(Debug)]
pub struct Config {
    keys: Map<String, Value>,
    /// `rope_parameters.` and the like, put before names.
    path: String,
    file: Rc<ConfigFile>,
}

/// What the objects of a file share.
#[derive(Debug)]
struct ConfigFile {
    keys: Map<String, Value>,
    /// Paths of the keys that were asked for.
    read: RefCell<BTreeSet<String>>,
    /// Paths of the objects whose own keys count.
    opened: RefCell<BTreeSet<String>>,
}

/// Where a wrapper of several modalities has the settings of its language model.
const TEXT: &str = "text_config";
/// The keys of a wrapper that count for its language model, where that has none of its own.
const OF_WRAPPER: &[&str] = &["tie_word_embeddings"];

impl Config {
    /// Parses the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Config> {
        match serde_json::from_str(text) {
            Ok(Value::Object(keys)) => {
                let file = ConfigFile { keys: keys.clone(), read: RefCell::default(), opened: RefCell::default() };
                Ok(Config { keys, path: String::new(), file: Rc::new(file) })
            }
            Ok(_) => bail!("config.json is not an object"),
            Err(e) => bail!("config.json: {e}"),
        }
    }

    /// The value of a key; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.file.read.borrow_mut().insert(format!("{}{key}", self.path));
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

    /// A nested object, if there. Its keys count one by one from now on, as `rope_parameters.factor`.
    pub fn opt_object(&self, key: &str) -> Result<Option<Config>> {
        let Some(keys) = self.typed(key, "an object", |v| v.as_object().cloned())? else { return Ok(None) };
        let path = format!("{}{key}", self.path);
        self.file.opened.borrow_mut().insert(path.clone());
        Ok(Some(Config { keys, path: path + ".", file: self.file.clone() }))
    }

    /// The settings of the language model: `text_config` in the checkpoint of a wrapper of several modalities (Gemma 3,
    /// Mistral 3), the config itself in any other. Where only the wrapper says whether embeddings are tied, that counts; so do
    /// keys that it repeats with the values of its language model.
    pub fn text(&self) -> Result<Config> {
        let Some(mut text) = self.opt_object(TEXT)? else {
            return Ok(Config { keys: self.keys.clone(), path: self.path.clone(), file: self.file.clone() });
        };
        for (key, value) in &self.keys {
            if OF_WRAPPER.contains(&key.as_str()) && text.keys.get(key).is_none_or(Value::is_null) {
                text.keys.insert(key.clone(), value.clone());
            }
            if text.keys.get(key) == Some(value) {
                self.get(key);
            }
        }
        Ok(text)
    }

    /// The same config with values for keys that it does not have, as the configuration class of transformers has them.
    #[must_use]
    pub fn with_defaults(&self, defaults: &[(&str, Value)]) -> Config {
        let mut keys = self.keys.clone();
        for (key, value) in defaults {
            keys.entry(*key).or_insert_with(|| value.clone());
        }
        Config { keys, path: self.path.clone(), file: self.file.clone() }
    }

    /// The same config with another value for a key.
    #[must_use]
    pub fn with_value(&self, key: &str, value: Value) -> Config {
        let mut keys = self.keys.clone();
        keys.insert(key.to_owned(), value);
        Config { keys, path: self.path.clone(), file: self.file.clone() }
    }

    /// The same config, in which the value of a key is found under another name, too: `[("num_layers", "num_hidden_layers")]`.
    #[must_use]
    pub fn with_names(&self, names: &[(&str, &str)]) -> Config {
        let mut keys = self.keys.clone();
        for (stated, name) in names {
            if let Some(value) = self.get(stated) {
                keys.entry(*name).or_insert_with(|| value.clone());
            }
        }
        Config { keys, path: self.path.clone(), file: self.file.clone() }
    }

    /// The output projection's tensor: the embedding where `tie_word_embeddings` says so, else `lm_head.weight`.
    pub fn head_tensor<'a>(&self, embedding: &'a str, tied_by_default: bool) -> Result<&'a str> {
        Ok(if self.flag("tie_word_embeddings", tied_by_default)? { embedding } else { "lm_head.weight" })
    }

    /// Refuses a value that the family does not compute. A key that is absent or null is fine.
    pub fn only(&self, key: &str, values: &[Value]) -> Result<()> {
        match self.get(key) {
            Some(value) if !values.contains(value) => {
                let known: Vec<String> = values.iter().map(Value::to_string).collect();
                bail!("config.json: '{}{key}' is {value}, this family computes only {}", self.path, known.join(" and "))
            }
            _ => Ok(()),
        }
    }

    /// An activation by the name that PyTorch has for it; `default` where absent.
    pub fn activation(&self, key: &str, default: &str) -> Result<String> {
        let name = self.opt_text(key)?.unwrap_or_else(|| default.into());
        Ok(match name.as_str() {
            "swish" => "silu",
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => "gelu_tanh",
            other => other,
        }
        .into())
    }

    /// Which layers have a sliding window: as `layer_types` says in files of transformers 5, else as `pattern` says of a layer.
    pub fn sliding_layers(&self, layers: usize, pattern: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
        let Some(types) = self.opt_texts("layer_types")? else { return Ok((0..layers).map(pattern).collect()) };
        if types.len() != layers {
            return bail!("config.json: {} layer_types for {layers} layers", types.len());
        }
        let slides = |kind: &String| match kind.as_str() {
            "full_attention" => Ok(false),
            "sliding_attention" => Ok(true),
            other => bail!("config.json: layer type '{other}' is not supported by this family"),
        };
        types.iter().map(slides).collect()
    }

    /// The window of every layer, as Qwen2 and its kin state it: only where `use_sliding_window` is true, and without
    /// `layer_types` in the layers from `max_window_layers` on (28 where absent).
    pub fn layer_windows(&self, layers: usize) -> Result<Vec<Option<usize>>> {
        let first = self.opt_int("max_window_layers")?.unwrap_or(28);
        let stated = self.opt_size("sliding_window")?;
        let window = match self.flag("use_sliding_window", false)? {
            // A window of `null` is none, one that is left out is transformers' default.
            true if !self.has("sliding_window") => Some(4096),
            true => stated,
            false => None,
        };
        let sliding = self.sliding_layers(layers, |layer| window.is_some() && layer >= first)?;
        match window {
            None if sliding.contains(&true) => {
                bail!("config.json: a layer is of sliding_attention, but sliding_window is not in use")
            }
            _ => Ok(sliding.into_iter().map(|slides| window.filter(|_| slides)).collect()),
        }
    }

    /// Whether a key is there, be it with the value `null`.
    pub fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// Keys of the whole file with a value that were never asked for. Of an object that was opened, every key counts, as in
    /// `rope_parameters.factor`; of another, the object.
    pub fn unread(&self) -> Vec<String> {
        let mut unread = Vec::new();
        self.file.unread(&self.file.keys, "", &mut unread);
        unread.sort();
        unread
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

impl ConfigFile {
    fn unread(&self, keys: &Map<String, Value>, prefix: &str, unread: &mut Vec<String>) {
        for (key, value) in keys.iter().filter(|(_, value)| !value.is_null()) {
            let path = format!("{prefix}{key}");
            match value.as_object() {
                Some(inner) if self.opened.borrow().contains(&path) => self.unread(inner, &(path + "."), unread),
                _ if !self.read.borrow().contains(&path) => unread.push(path),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::Config;

    #[test]
    fn keys_of_opened_objects_count_one_by_one() {
        let config =
            r#"{"a": 1, "b": null, "c": {"d": 1, "e": 2}, "f": {"g": 1}, "h": {"i": {"j": 1}}, "k": {"l": 1}}"#;
        let config = Config::parse(config).unwrap();
        let inner = config.opt_object("c").unwrap().unwrap();
        inner.int("d").unwrap();
        config.get("f");
        config.opt_object("h").unwrap().unwrap().opt_object("i").unwrap();
        assert_eq!(inner.unread(), ["a", "c.e", "h.i.j", "k"]);
        assert_eq!(config.unread(), inner.unread());
        let error = inner.opt_text("e").unwrap_err();
        assert!(error.message.contains("'c.e' should be a text"), "{error}");
    }

    #[test]
    fn a_wrapper_has_its_language_model_inside() {
        let wrapped = r#"{"tie_word_embeddings": false, "vocab_size": 9, "hidden_size": 3, "vision_config": {"hidden_size": 5},
            "text_config": {"hidden_size": 4, "vocab_size": 9, "other": 1}}"#;
        let config = Config::parse(wrapped).unwrap();
        let text = config.text().unwrap();
        assert_eq!(text.size("hidden_size").unwrap(), 4);
        assert!(!text.flag("tie_word_embeddings", true).unwrap());
        assert_eq!(config.unread(), ["hidden_size", "text_config.other", "text_config.vocab_size", "vision_config"]);
        assert!(text.size("layers").unwrap_err().message.contains("'text_config.layers' is missing"));

        let plain = Config::parse(r#"{"hidden_size": 4, "other": 1}"#).unwrap();
        assert_eq!(plain.text().unwrap().size("hidden_size").unwrap(), 4);
        assert_eq!(plain.unread(), ["other"]);
    }
}
