//! Messages of Protocol Buffers (protobuf.dev/programming-guides/encoding), field by field: the trackers' files have few kinds.

/// A whole number in groups of seven bits, the low ones first.
pub(super) fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A whole number as a field; negative ones as two's complement of 64 bits.
pub(super) fn field_number(number: u64, value: i64) -> Vec<u8> {
    [varint(number << 3), varint(value as u64)].concat()
}

pub(super) fn field_double(number: u64, value: f64) -> Vec<u8> {
    [varint(number << 3 | 1), value.to_le_bytes().to_vec()].concat()
}

/// A text, bytes, or another message.
pub(super) fn field_bytes(number: u64, value: &[u8]) -> Vec<u8> {
    [varint(number << 3 | 2), varint(value.len() as u64), value.to_vec()].concat()
}

/// A text that may be missing.
pub(super) fn field_text(number: u64, value: &str) -> Vec<u8> {
    if value.is_empty() { Vec::new() } else { field_bytes(number, value.as_bytes()) }
}

/// `google.protobuf.Timestamp`, of seconds since 1970.
pub(super) fn field_time(number: u64, seconds: f64) -> Vec<u8> {
    let nanos = (seconds.fract() * 1e9) as i64;
    field_bytes(number, &[field_number(1, seconds as i64), field_number(2, nanos)].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_protobuf_has_them() {
        assert_eq!(varint(300), [0xac, 0x02]);
        assert_eq!(field_bytes(5, b"ab"), [0x2a, 2, b'a', b'b']);
        assert_eq!(field_bytes(16, b"a"), [0x82, 0x01, 1, b'a']);
        assert_eq!(field_number(1, 150), [0x08, 0x96, 0x01]);
        assert_eq!(field_number(1, -1).len(), 11);
    }
}
