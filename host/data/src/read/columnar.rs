//! Rows of parquet and of Arrow IPC, as a file or as the stream that Hugging Face's `save_to_disk` writes.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch, StructArray};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, DataType};
use dpo_plugin_api::dataset::Row;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::Field;
use serde_json::Value;

use super::Give;
use super::row::{Budget, SourceRow};
use dpo_core::error::{Error, IoContext, Result};

/// How a file of Arrow begins that is no stream.
const ARROW: &[u8] = b"ARROW1";

pub(super) fn read_parquet(path: &Path, give: Give<'_>) -> Result<()> {
    let file = File::open(path).reading(path)?;
    let mut left = Budget::of(&file);
    let broken = |e: parquet::errors::ParquetError| Error::input(format!("broken parquet: {e}")).at(path.display());
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    for (i, row) in reader.get_row_iter(None).map_err(broken)?.enumerate() {
        // The reader cannot go on after a broken page, so that is the file's error.
        let place = || format!("{}: row {}", path.display(), i + 1);
        let row = parquet_keys(row.map_err(|e| broken(e).at(place()))?.get_column_iter());
        left.spend_row(&row).map_err(|e| e.at(place()))?;
        give(SourceRow::numbered(path, i, row))?;
    }
    Ok(())
}

/// Keys that are null are left out: parquet has one set of columns for all rows, and fills those that a row lacks.
fn parquet_keys<'a>(keys: impl Iterator<Item = (&'a String, &'a Field)>) -> Row {
    let keys = keys.filter(|(_, value)| !matches!(value, Field::Null));
    keys.map(|(name, value)| (name.clone(), parquet_value(value))).collect()
}

/// Numbers, texts, lists and groups are what rows are made of; anything else becomes its text.
fn parquet_value(value: &Field) -> Value {
    match value {
        Field::Null => Value::Null,
        Field::Bool(flag) => (*flag).into(),
        Field::Byte(number) => (*number).into(),
        Field::Short(number) => (*number).into(),
        Field::Int(number) => (*number).into(),
        Field::Long(number) => (*number).into(),
        Field::UByte(number) => (*number).into(),
        Field::UShort(number) => (*number).into(),
        Field::UInt(number) => (*number).into(),
        Field::ULong(number) => (*number).into(),
        Field::Float(number) => (*number).into(),
        Field::Double(number) => (*number).into(),
        Field::Str(text) => text.as_str().into(),
        // Some writers leave out that a column is text.
        Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into(),
        Field::Group(row) => Value::Object(parquet_keys(row.get_column_iter())),
        Field::ListInternal(list) => list.elements().iter().map(parquet_value).collect(),
        Field::MapInternal(map) => {
            let key = |key: &Field| if let Field::Str(text) = key { text.clone() } else { key.to_string() };
            map.entries().iter().map(|(k, v)| (key(k), parquet_value(v))).collect()
        }
        other => other.to_string().into(),
    }
}

/// # Errors
/// A broken file, and columns of a kind that rows do not have.
pub(super) fn read_arrow(path: &Path, give: Give<'_>) -> Result<()> {
    let mut file = File::open(path).reading(path)?;
    let (mut left, bytes) = (Budget::of(&file), file.metadata().reading(path)?.len());
    let mut begins = Vec::new();
    file.by_ref().take(ARROW.len() as u64).read_to_end(&mut begins).reading(path)?;
    file.seek(SeekFrom::Start(0)).reading(path)?;
    let broken = |e: ArrowError| match e.to_string() {
        // Its reader takes the file's word for how much memory that needs.
        e if e.contains("compression") => Error::input("its columns are compressed, which is not read of arrow")
            .at(path.display())
            .help("write it without compression, or as parquet"),
        e => Error::input(format!("broken arrow: {e}")).at(path.display()),
    };
    let file = BufReader::new(file);
    let batches: Box<dyn Iterator<Item = std::result::Result<RecordBatch, ArrowError>>> = match begins == ARROW {
        true => Box::new(FileReader::try_new(file, None).map_err(broken)?),
        false => Box::new(StreamReader::try_new(file, None).map_err(broken)?),
    };
    let mut count = 0;
    for batch in batches {
        let batch = StructArray::from(batch.map_err(broken)?);
        // Columns of nulls have any number of rows and no bytes.
        if batch.len() as u64 > bytes.saturating_mul(8) {
            return Err(Error::input("broken arrow: it has more rows than bits").at(path.display()));
        }
        for at in 0..batch.len() {
            left.spend_row(&Row::new()).map_err(|e| e.at(path.display()))?;
            let row = arrow_keys(&batch, at, &mut left).map_err(|e| e.at(path.display()))?;
            give(SourceRow::numbered(path, count, row))?;
            count += 1;
        }
    }
    Ok(())
}

/// Keys that are null are left out, as those of parquet.
fn arrow_keys(columns: &StructArray, at: usize, left: &mut Budget) -> Result<Row> {
    let mut row = Row::new();
    for (field, column) in columns.fields().iter().zip(columns.columns()) {
        if column.is_valid(at) && *field.data_type() != DataType::Null {
            left.spend(field.name().len() as u64)?;
            row.insert(field.name().clone(), arrow_value(column, at, left)?);
        }
    }
    Ok(row)
}

/// A value of a column. What it takes is counted before it is made: many values may be views of one long text.
fn arrow_value(array: &dyn Array, at: usize, left: &mut Budget) -> Result<Value> {
    left.spend(size_of::<Value>() as u64)?;
    if array.is_null(at) {
        return Ok(Value::Null);
    }
    macro_rules! number {
        ($kind:ty) => {
            array.as_primitive::<$kind>().value(at).into()
        };
    }
    let mut text = |bytes: &[u8]| -> Result<Value> {
        left.spend(bytes.len() as u64)?;
        Ok(String::from_utf8_lossy(bytes).into())
    };
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(at).into(),
        DataType::Int8 => number!(Int8Type),
        DataType::Int16 => number!(Int16Type),
        DataType::Int32 => number!(Int32Type),
        DataType::Int64 => number!(Int64Type),
        DataType::UInt8 => number!(UInt8Type),
        DataType::UInt16 => number!(UInt16Type),
        DataType::UInt32 => number!(UInt32Type),
        DataType::UInt64 => number!(UInt64Type),
        DataType::Float16 => array.as_primitive::<Float16Type>().value(at).to_f32().into(),
        DataType::Float32 => number!(Float32Type),
        DataType::Float64 => number!(Float64Type),
        DataType::Utf8 => text(array.as_string::<i32>().value(at).as_bytes())?,
        DataType::LargeUtf8 => text(array.as_string::<i64>().value(at).as_bytes())?,
        DataType::Utf8View => text(array.as_string_view().value(at).as_bytes())?,
        DataType::Binary => text(array.as_binary::<i32>().value(at))?,
        DataType::LargeBinary => text(array.as_binary::<i64>().value(at))?,
        DataType::List(_) => arrow_list(&array.as_list::<i32>().value(at), left)?,
        DataType::LargeList(_) => arrow_list(&array.as_list::<i64>().value(at), left)?,
        DataType::FixedSizeList(..) => arrow_list(&array.as_fixed_size_list().value(at), left)?,
        DataType::Struct(_) => Value::Object(arrow_keys(array.as_struct(), at, left)?),
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let key = arrow_value(dictionary.keys(), at, left)?.as_u64().and_then(|key| usize::try_from(key).ok());
            let key = key.filter(|key| *key < dictionary.values().len());
            arrow_value(dictionary.values(), key.ok_or_else(|| Error::input("broken arrow: a key of no value"))?, left)?
        }
        // No format reads a date.
        kind if kind.is_temporal() => Value::Null,
        other => {
            return Err(Error::input(format!("a column of arrow's kind {other} is not read")).help("write it as text"));
        }
    })
}

fn arrow_list(list: &dyn Array, left: &mut Budget) -> Result<Value> {
    (0..list.len()).map(|at| arrow_value(list, at, left)).collect::<Result<Vec<_>>>().map(Value::Array)
}
