//! The container: what stands before the tensors of a GGUF file of version 3 (ggml, `docs/gguf.md`). All numbers are little-endian.

use crate::quantize::TensorType;

/// Where tensors begin, and the metadata end: at multiples of this.
pub const ALIGNMENT: usize = 32;

const VERSION: u32 = 3;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A number.
    U32(u32),
    /// A number.
    F32(f32),
    /// A flag.
    Bool(bool),
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Numbers.
    F32s(Vec<f32>),
    /// Numbers.
    I32s(Vec<i32>),
}

/// Names and values, in the order in which they are written.
pub type Metadata = Vec<(String, Value)>;

/// A tensor as the file's header states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its shape, rows before columns; a file has it the other way round.
    pub shape: Vec<usize>,
    /// Its number format.
    pub kind: TensorType,
}

impl TensorInfo {
    /// Bytes of its data.
    pub fn bytes(&self) -> usize {
        self.kind.bytes(self.shape.iter().product())
    }

    /// Zeros behind its data.
    pub fn padding(&self) -> usize {
        padding(self.bytes())
    }
}

fn padding(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT) - bytes
}

/// All that is before the data of the first tensor.
pub fn header(metadata: &Metadata, tensors: &[TensorInfo]) -> Vec<u8> {
    let mut to = Vec::new();
    to.extend(b"GGUF");
    to.extend(VERSION.to_le_bytes());
    to.extend((tensors.len() as u64).to_le_bytes());
    to.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(key, &mut to);
        put(value, &mut to);
    }
    let mut offset = 0_usize;
    for tensor in tensors {
        text(&tensor.name, &mut to);
        to.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|size| to.extend((*size as u64).to_le_bytes()));
        to.extend(tensor.kind.id().to_le_bytes());
        to.extend((offset as u64).to_le_bytes());
        offset += tensor.bytes() + tensor.padding();
    }
    to.resize(to.len() + padding(to.len()), 0);
    to
}

fn put(value: &Value, to: &mut Vec<u8>) {
    const ARRAY: u32 = 9;
    let kind = |value: &Value| match value {
        Value::U32(_) => 4_u32,
        Value::I32s(_) => 5,
        Value::F32(_) | Value::F32s(_) => 6,
        Value::Bool(_) => 7,
        Value::Text(_) | Value::Texts(_) => 8,
    };
    let mut array = |length: usize| {
        to.extend(ARRAY.to_le_bytes());
        to.extend(kind(value).to_le_bytes());
        to.extend((length as u64).to_le_bytes());
    };
    match value {
        Value::Texts(all) => array(all.len()),
        Value::F32s(all) => array(all.len()),
        Value::I32s(all) => array(all.len()),
        _ => to.extend(kind(value).to_le_bytes()),
    }
    match value {
        Value::U32(number) => to.extend(number.to_le_bytes()),
        Value::F32(number) => to.extend(number.to_le_bytes()),
        Value::Bool(flag) => to.push(u8::from(*flag)),
        Value::Text(own) => text(own, to),
        Value::Texts(all) => all.iter().for_each(|own| text(own, to)),
        Value::F32s(all) => all.iter().for_each(|number| to.extend(number.to_le_bytes())),
        Value::I32s(all) => all.iter().for_each(|number| to.extend(number.to_le_bytes())),
    }
}

fn text(own: &str, to: &mut Vec<u8>) {
    to.extend((own.len() as u64).to_le_bytes());
    to.extend(own.as_bytes());
}
