//! Real guests under the `ruse` program, judged by what they print and how they end.

mod linux;
mod machine;
