//! Sections: named, versioned pieces of a guest that the engine carries and never looks into.
//!
//! A STATE frame carries one section:
//!
//! ```text
//! name length u16 │ name │ version u16 │ data                                      (little-endian)
//! ```

use serde::{Deserialize, Serialize};

/// One section of device or vCPU state, or one fact about the guest in its [`Description`](crate::Description).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "SectionText", try_from = "SectionText")]
pub struct Section {
    /// Name and version of the contents, and whether the destination needs them.
    pub kind: SectionKind,
    /// Contents, at most [`Section::DATA_LIMIT`] bytes.
    pub data: Vec<u8>,
}

/// Name and version of a section, and whether the destination needs it.
///
/// A destination refuses a guest with a [`Need::Required`] section that it does not know or whose version is
/// newer than its own. It ignores such a section if it is [`Need::Optional`]. [`misfits`] applies this rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionKind {
    /// Name, such as `vcpu0`: at most [`SectionKind::NAME_LIMIT`] bytes.
    pub name: String,
    /// Version of the contents.
    pub version: u16,
    /// Whether the destination needs the section.
    #[serde(default)]
    pub need: Need,
}

/// Whether a guest can do without a section.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Need {
    /// The guest cannot run without the section.
    #[default]
    Required,
    /// The guest runs without the section.
    Optional,
}

impl Section {
    /// Most bytes of data in one section: a STATE frame holds them with the longest name.
    pub const DATA_LIMIT: usize = (1 << 20) - SectionKind::NAME_LIMIT - 4;

    /// Creates a section that the destination needs.
    pub fn required(name: impl Into<String>, version: u16, data: impl Into<Vec<u8>>) -> Self {
        let (kind, data) = (SectionKind::required(name, version), data.into());
        Self { kind, data }
    }

    /// Returns the section `name` of `sections`.
    #[must_use]
    pub fn find<'a>(sections: &'a [Self], name: &str) -> Option<&'a Self> {
        sections.iter().find(|section| section.kind.name == name)
    }
}

impl SectionKind {
    /// Most bytes of a name.
    pub const NAME_LIMIT: usize = 255;

    /// Creates the kind of a section that the destination needs.
    pub fn required(name: impl Into<String>, version: u16) -> Self {
        let (name, need) = (name.into(), Need::Required);
        Self {
            name,
            version,
            need,
        }
    }

    /// Creates the kind of a section that the destination may ignore.
    pub fn optional(name: impl Into<String>, version: u16) -> Self {
        let (name, need) = (name.into(), Need::Optional);
        Self {
            name,
            version,
            need,
        }
    }
}

/// Returns one sentence for each reason why a destination that reads the sections `known` cannot take a guest
/// with the sections `announced`: a required section that is unknown or too new, and a section that the
/// destination requires and the source does not have.
#[must_use]
pub fn misfits(announced: &[SectionKind], known: &[SectionKind]) -> Vec<String> {
    let version_of = |kinds: &[SectionKind], name: &str| {
        let kind = kinds.iter().find(|kind| kind.name == name);
        kind.map(|kind| kind.version)
    };
    let unreadable = announced
        .iter()
        .filter(|kind| kind.need == Need::Required)
        .filter_map(
            |SectionKind { name, version, .. }| match version_of(known, name) {
                None => Some(format!(
                    "section {name:?} version {version} is not known here"
                )),
                Some(here) if here < *version => Some(format!(
                    "section {name:?} has version {version}, this side reads up to version {here}"
                )),
                Some(_) => None,
            },
        );
    let missing = known
        .iter()
        .filter(|kind| kind.need == Need::Required && version_of(announced, &kind.name).is_none())
        .map(|kind| format!("section {:?} is required here and not announced", kind.name));
    unreadable.chain(missing).collect()
}

/// Encodes the name and version of a section, as they precede its data in a STATE frame.
///
/// # Errors
/// Returns a sentence if the name is too long.
pub(crate) fn encode_kind(kind: &SectionKind) -> Result<Vec<u8>, String> {
    let length = u16::try_from(kind.name.len())
        .ok()
        .filter(|length| usize::from(*length) <= SectionKind::NAME_LIMIT)
        .ok_or_else(|| name_too_long(kind.name.len()))?;
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend(kind.name.as_bytes());
    bytes.extend(kind.version.to_le_bytes());
    Ok(bytes)
}

/// Decodes a STATE frame into a name, a version and the data.
///
/// # Errors
/// Returns a sentence if the payload is cut short, or if the name is too long or not UTF-8.
pub(crate) fn decode(payload: &[u8]) -> Result<(&str, u16, &[u8]), String> {
    let short = || "it ends before its name and version do".to_owned();
    let (length, rest) = payload.split_first_chunk::<2>().ok_or_else(short)?;
    let length = usize::from(u16::from_le_bytes(*length));
    if length > SectionKind::NAME_LIMIT {
        return Err(name_too_long(length));
    }
    let (name, rest) = rest.split_at_checked(length).ok_or_else(short)?;
    let name = std::str::from_utf8(name).map_err(|_| "its name is not UTF-8".to_owned())?;
    let (version, data) = rest.split_first_chunk::<2>().ok_or_else(short)?;
    Ok((name, u16::from_le_bytes(*version), data))
}

fn name_too_long(length: usize) -> String {
    format!(
        "a section name of {length} bytes, at most {} are allowed",
        SectionKind::NAME_LIMIT
    )
}

/// A section in JSON, its data in hexadecimal.
#[derive(Serialize, Deserialize)]
struct SectionText {
    name: String,
    version: u16,
    #[serde(default)]
    need: Need,
    data: String,
}

impl From<Section> for SectionText {
    fn from(section: Section) -> Self {
        let SectionKind {
            name,
            version,
            need,
        } = section.kind;
        Self {
            name,
            version,
            need,
            data: to_hex(&section.data),
        }
    }
}

impl TryFrom<SectionText> for Section {
    type Error = String;

    fn try_from(text: SectionText) -> Result<Self, String> {
        let data = from_hex(&text.data)
            .ok_or_else(|| format!("section {:?}: its data is not hexadecimal", text.name))?;
        let kind = SectionKind {
            name: text.name,
            version: text.version,
            need: text.need,
        };
        Ok(Self { kind, data })
    }
}

fn to_hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(value.into(), 16).unwrap_or('0');
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
        .collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| {
        let value = char::from(byte).to_digit(16)?;
        u8::try_from(value).ok()
    };
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        return None;
    };
    pairs
        .iter()
        .map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?))
        .collect()
}

/// Checks that `sections` has each required section of `announced`, and none twice, and that none is too long.
///
/// # Errors
/// Returns a sentence about the first section for which this does not hold.
pub(crate) fn check_complete(
    announced: &[SectionKind],
    sections: &[Section],
) -> Result<(), String> {
    for (index, section) in sections.iter().enumerate() {
        let (name, bytes) = (&section.kind.name, section.data.len());
        if Section::find(&sections[..index], name).is_some() {
            return Err(format!("section {name:?} is there twice"));
        }
        if bytes > Section::DATA_LIMIT {
            return Err(format!(
                "section {name:?} has {bytes} bytes, at most {} are allowed: split it",
                Section::DATA_LIMIT
            ));
        }
    }
    let missing = announced
        .iter()
        .find(|kind| kind.need == Need::Required && Section::find(sections, &kind.name).is_none());
    match missing {
        None => Ok(()),
        Some(kind) => Err(format!(
            "section {:?} was announced as required and is missing",
            kind.name
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_arrives_as_it_was_sent() {
        let kind = SectionKind::required("vcpu0", 0x0102);
        let mut payload = encode_kind(&kind).unwrap();
        assert_eq!(payload, b"\x05\x00vcpu0\x02\x01");
        payload.extend(b"state");
        assert_eq!(
            decode(&payload).unwrap(),
            ("vcpu0", 0x0102, b"state".as_slice())
        );
        for length in 0..9 {
            decode(&payload[..length]).unwrap_err();
        }
    }

    #[test]
    fn sections_are_complete_if_each_required_one_is_there_once() {
        let announced = [
            SectionKind::required("vcpu0", 1),
            SectionKind::optional("rng", 1),
        ];
        let vcpu = || Section::required("vcpu0", 1, [1]);
        check_complete(&announced, &[vcpu()]).unwrap();
        let missing = check_complete(&announced, &[]).unwrap_err();
        assert!(
            missing.contains("\"vcpu0\" was announced as required"),
            "{missing}"
        );
        let twice = check_complete(&announced, &[vcpu(), vcpu()]).unwrap_err();
        assert!(twice.contains("twice"), "{twice}");
        let long = Section::required("vcpu0", 1, vec![0; Section::DATA_LIMIT + 1]);
        let long = check_complete(&announced, &[long]).unwrap_err();
        assert!(long.contains("at most 1048317 are allowed"), "{long}");
    }

    #[test]
    fn a_name_that_is_too_long_or_no_text_is_refused() {
        encode_kind(&SectionKind::required("x".repeat(256), 1)).unwrap_err();
        let error = decode(&[0xff, 0xff]).unwrap_err();
        assert!(error.contains("65535 bytes"), "{error}");
        let error = decode(&[1, 0, 0xff, 1, 0]).unwrap_err();
        assert!(error.contains("UTF-8"), "{error}");
    }

    #[test]
    fn data_is_hexadecimal_in_json() {
        let section = Section::required("processor", 2, [0x0a, 0xff]);
        let json = serde_json::to_value(&section).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"name": "processor", "version": 2, "need": "required", "data": "0aff"})
        );
        assert_eq!(serde_json::from_value::<Section>(json).unwrap(), section);
        for data in ["0", "0g", "é"] {
            let json = serde_json::json!({"name": "x", "version": 1, "data": data});
            serde_json::from_value::<Section>(json).unwrap_err();
        }
    }

    #[test]
    fn required_sections_must_be_known_and_optional_ones_need_not() {
        let known = [
            SectionKind::required("cpu", 3),
            SectionKind::optional("log", 1),
        ];
        let misfits_of = |announced: &[SectionKind]| misfits(announced, &known).join("; ");
        assert_eq!(misfits_of(&[SectionKind::required("cpu", 3)]), "");
        assert_eq!(misfits_of(&[SectionKind::required("cpu", 2)]), "");
        assert_eq!(
            misfits_of(&[
                SectionKind::required("cpu", 3),
                SectionKind::optional("log", 9),
                SectionKind::optional("gpu", 1),
            ]),
            ""
        );
        let too_new = misfits_of(&[SectionKind::required("cpu", 4)]);
        assert!(too_new.contains("reads up to version 3"), "{too_new}");
        let unknown = misfits_of(&[
            SectionKind::required("cpu", 3),
            SectionKind::required("gpu", 1),
        ]);
        assert!(
            unknown.contains("\"gpu\" version 1 is not known"),
            "{unknown}"
        );
        let missing = misfits_of(&[]);
        assert!(missing.contains("\"cpu\" is required"), "{missing}");
    }
}
