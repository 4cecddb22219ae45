//! `runs/`: the log as TensorBoard reads it.
//!
//! An event file is a run of TFRecords (length, its checksum, data, its checksum; checksums are CRC-32C, rotated and offset
//! as `tensorflow/core/lib/hash/crc32c.h` masks them) of `Event` messages (`tensorflow/core/util/event.proto`), of which
//! only scalars are written here.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::protobuf::{field_bytes, field_double, varint};
use super::{Line, now, numbers, step};
use dpo_core::error::{IoContext, Result};

pub(super) struct TensorBoard {
    file: File,
    path: PathBuf,
    /// Bytes of whole records.
    length: u64,
}

impl TensorBoard {
    /// A new event file in `runs/` with the lines of the log so far. It takes the place of those that earlier parts of the
    /// run left: their last steps may be ones that are taken again, and the format has no way to take them back.
    pub(super) fn create(output: &Path, lines: &[Line]) -> Result<TensorBoard> {
        let folder = output.join("runs");
        std::fs::create_dir_all(&folder).writing(&folder)?;
        let name = format!("events.out.tfevents.{}.{}.dpo-host", now() as u64, std::process::id());
        let path = folder.join(&name);
        let file = OpenOptions::new().create(true).append(true).open(&path).writing(&path)?;
        let mut board = TensorBoard { file, path, length: 0 };
        let mut event = field_double(1, now());
        event.extend(field_bytes(3, b"brain.Event:2"));
        board.record(&event)?;
        lines.iter().try_for_each(|line| board.write(line))?;
        let ours = |n: &str| n.starts_with("events.out.tfevents.") && n.ends_with(".dpo-host") && n != name;
        for other in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            if other.file_name().to_str().is_some_and(ours) {
                let _ = std::fs::remove_file(other.path());
            }
        }
        Ok(board)
    }

    /// The numbers of a line of the log, at its step.
    pub(super) fn write(&mut self, line: &Line) -> Result<()> {
        let summary = numbers(line).map(|(name, value)| {
            let mut scalar = field_bytes(1, name.as_bytes());
            scalar.push(2 << 3 | 5);
            scalar.extend((value as f32).to_le_bytes());
            field_bytes(1, &scalar)
        });
        let mut event = field_double(1, now());
        event.push(2 << 3);
        event.extend(varint(step(line)));
        event.extend(field_bytes(5, &summary.flatten().collect::<Vec<u8>>()));
        self.record(&event)
    }

    fn record(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let parts = [&length[..], &masked(&length).to_le_bytes(), data, &masked(data).to_le_bytes()];
        let record = parts.concat();
        if let Err(e) = self.file.write_all(&record) {
            // Behind half a record nothing of the file could be read.
            let _ = self.file.set_len(self.length);
            return Err(e).writing(&self.path);
        }
        self.length += record.len() as u64;
        Ok(())
    }
}

fn masked(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (RFC 3720, appendix B.4), bit by bit: a log has few bytes.
fn crc32c(data: &[u8]) -> u32 {
    let step = |crc: u32| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
    !data.iter().fold(!0, |crc: u32, byte| (0..8).fold(crc ^ u32::from(*byte), |c, _| step(c)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }
}
