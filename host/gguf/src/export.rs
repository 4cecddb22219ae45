//! A GGUF file, planned as a whole before its first byte, then written tensor by tensor: of a weight some MiB are in memory as values.

use std::io::Write;
use std::path::Path;

use dpo_core::console::Remark;
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::lora::Merged;
use dpo_data::tokens::ChatTokenizer;
use dpo_plugin_api::graph::ModelGraph;
use serde_json::Value as Json;

use crate::architecture::Architecture;
use crate::facts::Facts;
use crate::file::{self, Metadata, Value};
use crate::mixture::Mixture;
use crate::quantize::TensorType;
use crate::tensors::{self, Planned, Source as From};
use crate::{hyperparameters, modelfile, tokenizer};

/// Values of a weight that are computed at once.
const PIECE: usize = 4 << 20;

/// The largest f16.
const MOST_F16: f32 = 65504.0;

/// What a file is made of.
pub struct Source<'a> {
    /// The family's name.
    pub family: &'a str,
    /// Its graph.
    pub graph: &'a ModelGraph,
    /// The text of its `config.json`.
    pub config: &'a str,
    /// The checkpoint's folder, where its tokenizer is.
    pub folder: &'a Path,
    /// The family's chat template, for a checkpoint without one.
    pub template: Option<&'a str>,
    /// What the model is called.
    pub name: &'a str,
}

/// A file that can be written.
pub struct Export {
    header: Vec<u8>,
    tensors: Vec<Planned>,
    /// What llama.cpp does otherwise than this model.
    pub remarks: Vec<Remark>,
    modelfile: modelfile::Modelfile,
}

impl Export {
    /// Plans a file: needs no weights.
    ///
    /// # Errors
    /// A family without an architecture of llama.cpp, a model of which that would compute something else, a tokenizer that it does not know.
    pub fn plan(source: &Source<'_>, mixture: Mixture) -> Result<Export> {
        let architecture = Architecture::of(source.family)?;
        let facts = Facts::of(source.graph)?;
        let config: Json =
            serde_json::from_str(source.config).map_err(|e| Error::input(e.to_string()).at("config.json"))?;
        let hyperparameters = hyperparameters::of(architecture, &facts, config.get("text_config").unwrap_or(&config))?;
        let chat = ChatTokenizer::open(source.folder, source.template)?;
        let (of_tokenizer, more) = tokenizer::metadata(source.folder, &chat, facts.vocabulary)?;
        let mut metadata: Metadata = vec![
            ("general.architecture".into(), Value::Text(architecture.name.into())),
            ("general.type".into(), Value::Text("model".into())),
            ("general.name".into(), Value::Text(source.name.into())),
            ("general.file_type".into(), Value::U32(mixture.file_type())),
            ("general.quantization_version".into(), Value::U32(2)),
        ];
        metadata.extend(hyperparameters.metadata);
        metadata.extend(of_tokenizer);
        let tensors = tensors::planned(architecture, source.graph, &facts, mixture, hyperparameters.tensors)?;
        let infos: Vec<file::TensorInfo> = tensors.iter().map(|planned| planned.info.clone()).collect();
        let modelfile = modelfile::of(&chat);
        let remarks = [hyperparameters.remarks, more, modelfile.remarks.clone()].concat();
        Ok(Export { header: file::header(&metadata, &infos), tensors, remarks, modelfile })
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> usize {
        let of = |planned: &Planned| planned.info.bytes() + planned.info.padding();
        self.header.len() + self.tensors.iter().map(of).sum::<usize>()
    }

    /// What ollama is told of the file with this name beside it: a `Modelfile`.
    pub fn modelfile(&self, name: &str) -> String {
        self.modelfile.text(name)
    }

    /// Writes the file; `done` hears of its bytes.
    ///
    /// # Errors
    /// A weight that cannot be read, values that the format cannot hold, a full disk, with `path` as its place.
    pub fn write(&self, merged: &Merged<'_>, to: &mut impl Write, path: &Path, done: impl Fn(usize)) -> Result<()> {
        to.write_all(&self.header).writing(path)?;
        done(self.header.len());
        for Planned { info, source } in &self.tensors {
            let kind = info.kind;
            let mut put = |values: &[f32]| {
                finite(values, kind).map_err(|e| e.at(format!("tensor '{}'", info.name)))?;
                let packed = kind.pack(values);
                to.write_all(&packed).writing(path)?;
                done(packed.len());
                Ok::<(), Error>(())
            };
            match source {
                From::Values(values) => put(values)?,
                From::Weight { prefix, weight, order, offset } => {
                    let own = merged.weight(prefix, weight)?;
                    let rows: usize = info.shape.iter().product::<usize>() / own.columns();
                    let many = (PIECE / own.columns()).max(1);
                    for first in (0..rows).step_by(many) {
                        let piece: Vec<usize> = (first..rows.min(first + many)).map(|row| order.row(row)).collect();
                        let mut values = own.rows(&piece)?;
                        if *offset != 0.0 {
                            values.iter_mut().for_each(|value| *value += offset);
                        }
                        put(&values)?;
                    }
                }
            }
            to.write_all(&vec![0; info.padding()]).writing(path)?;
            done(info.padding());
        }
        Ok(())
    }
}

/// Refuses what a format cannot hold.
fn finite(values: &[f32], kind: TensorType) -> Result<()> {
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(Error::input(format!("has the value {value}")));
    }
    if kind == TensorType::F16 {
        // What is nearer to the next number than to the largest becomes infinite.
        if let Some(value) = values.iter().find(|value| value.abs() >= MOST_F16 + 16.0) {
            return Err(Error::input(format!("has the value {value}, f16 ends at {MOST_F16}")).help("--quantize bf16"));
        }
    }
    Ok(())
}
