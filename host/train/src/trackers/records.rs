//! A file of records as Weights & Biases and SwanLab keep a run that is not online: LevelDB's log format
//! (github.com/google/leveldb/blob/main/doc/log_format.md) behind a head of 7 bytes, with the CRC-32 of zlib in the place of
//! LevelDB's.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use dpo_core::error::{IoContext, Result};

/// Bytes of a block; a piece of a record lies within one.
const BLOCK: usize = 32768;
/// Bytes before a piece: its checksum, its length, which piece it is.
const HEAD: usize = 7;

pub(super) struct Records {
    file: File,
    path: PathBuf,
    /// Bytes of whole records.
    length: usize,
}

impl Records {
    /// A new file in the place of one that may be there. `kind` is who reads it, a number of its own, and the version.
    pub(super) fn create(path: PathBuf, (name, magic, version): (&[u8; 4], u16, u8)) -> Result<Records> {
        let mut file = File::create(&path).writing(&path)?;
        let head = [&name[..], &magic.to_le_bytes(), &[version]].concat();
        file.write_all(&head).writing(&path)?;
        Ok(Records { file, path, length: head.len() })
    }

    /// Adds records, all or none of them: behind half a record nothing of the file could be read.
    pub(super) fn append(&mut self, records: &[Vec<u8>]) -> Result<()> {
        let mut bytes = Vec::new();
        records.iter().for_each(|record| pieces(record, self.length, &mut bytes));
        if let Err(e) = self.file.write_all(&bytes) {
            let _ = self.file.set_len(self.length as u64);
            return Err(e).writing(&self.path);
        }
        self.length += bytes.len();
        Ok(())
    }
}

/// Adds the pieces of a record to bytes that will lie at `start` of the file.
fn pieces(mut record: &[u8], start: usize, bytes: &mut Vec<u8>) {
    let mut first = true;
    loop {
        let left = BLOCK - (start + bytes.len()) % BLOCK;
        if left < HEAD {
            bytes.resize(bytes.len() + left, 0);
            continue;
        }
        let (piece, rest) = record.split_at(record.len().min(left - HEAD));
        let kind = match (first, rest.is_empty()) {
            (true, true) => 1_u8,
            (true, false) => 2,
            (false, false) => 3,
            (false, true) => 4,
        };
        let checksum = crc32(&[&[kind], piece].concat());
        bytes.extend(checksum.to_le_bytes());
        bytes.extend((piece.len() as u16).to_le_bytes());
        bytes.push(kind);
        bytes.extend(piece);
        if rest.is_empty() {
            return;
        }
        (record, first) = (rest, false);
    }
}

/// CRC-32 (RFC 1952, section 8), bit by bit: a log has few bytes.
fn crc32(data: &[u8]) -> u32 {
    let step = |crc: u32| crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
    !data.iter().fold(!0, |crc: u32, byte| (0..8).fold(crc ^ u32::from(*byte), |c, _| step(c)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn records_keep_within_blocks() {
        // A block with room for 3 bytes behind the first record, then one record over three blocks.
        let mut bytes = Vec::new();
        pieces(&vec![1; BLOCK - HEAD - 3], 0, &mut bytes);
        assert_eq!((bytes.len(), bytes[6]), (BLOCK - 3, 1));
        pieces(&vec![2; 2 * BLOCK], 0, &mut bytes);
        assert_eq!(&bytes[BLOCK - 3..BLOCK], [0, 0, 0]);
        let kinds = [BLOCK, 2 * BLOCK, 3 * BLOCK].map(|at| bytes[at + 6]);
        assert_eq!(kinds, [2, 3, 4]);
        assert_eq!(bytes.len(), 3 * BLOCK + HEAD + 2 * HEAD);
    }
}
