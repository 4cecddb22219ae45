//! Memory: what the system has and this process took, and sizes as people write them.

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Memory that the system can give without swapping.
pub fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<usize>().ok()? * 1024)
}

/// Most memory this process has held, in GiB; 0 where the system does not say.
pub fn peak_memory_gib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = peak.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0);
    kib / (1024.0 * 1024.0)
}

/// Asks the system to back memory that nothing was written to yet with pages of 2 MiB, as far as they lie in it. Numbers that are
/// read from end to end for every token otherwise wait for the addresses of many small ones.
pub fn in_huge_pages<T>(room: &mut Vec<T>) {
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 1 << 21;
        let (start, bytes) = (room.as_mut_ptr() as usize, room.capacity() * size_of::<T>());
        let (first, end) = (start.next_multiple_of(HUGE), (start + bytes) / HUGE * HUGE);
        if first < end {
            // SAFETY: these addresses are of `room` alone, and the advice changes no value there. One that is not taken costs nothing.
            unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = room;
}

/// So many zeros in huge pages, which all threads clear: one clears some gigabytes a second.
pub fn zeros(count: usize) -> Vec<u64> {
    let mut room = Vec::with_capacity(count);
    in_huge_pages(&mut room);
    room.par_extend(rayon::iter::repeat_n(0, count));
    room
}

/// Bytes for people.
pub fn size(bytes: usize) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = units.iter().find(|(_, shift)| bytes >= 1 << shift);
    match unit {
        Some((name, shift)) => format!("{:.1} {name}", bytes as f64 / (1_u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

/// The least number without a unit that is taken for bytes; a smaller one is a unit forgotten.
const LEAST_BYTES: f64 = (1 << 20) as f64;

/// Bytes of a text such as `24GiB`, `900MB` or a plain number.
pub fn parse_size(text: &str) -> Result<usize> {
    let wrong = || Error::input(format!("'{text}' is not a size")).help("write it as 24GiB");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kib" | "k" => 1024.0,
        "mib" | "m" => 1024.0 * 1024.0,
        "gib" | "g" => 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        _ => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    if unit.is_empty() && number < LEAST_BYTES {
        return Err(Error::input(format!("'{text}' has no unit")).help(format!("write it as {text}GiB")));
    }
    Ok((number * factor) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("24GiB").unwrap(), 24 << 30);
        assert_eq!(parse_size("1.5 GB").unwrap(), 1_500_000_000);
        assert_eq!(parse_size("25769803776").unwrap(), 24 << 30);
        assert_eq!(parse_size("64B").unwrap(), 64);
        assert!(parse_size("much").is_err());
        let bare = parse_size("24").unwrap_err();
        assert!(bare.message().contains("no unit") && bare.advice() == Some("write it as 24GiB"), "{bare}");
        assert_eq!(size(3 << 29), "1.5 GiB");
    }
}
