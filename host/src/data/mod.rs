//! stub
/// A tokenised pair.
#[derive(Clone, Debug)]
pub struct TokenPair {
    /// p
    pub prompt: Vec<u32>,
    /// c
    pub chosen: Vec<u32>,
    /// r
    pub rejected: Vec<u32>,
    /// at
    pub place: String,
}
