//! The archive format that the Linux kernel unpacks as its first file system ("newc" cpio, kernel documentation
//! `driver-api/early-userspace/buffer-format`).

/// A file system in the making. Folders have to be added before what lies in them.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
const CHAR_DEVICE: u32 = 0o020_600;

impl Archive {
    /// A folder.
    pub(crate) fn folder(&mut self, path: &str) {
        self.entry(path, FOLDER, (0, 0), &[]);
    }

    /// A file that may be executed.
    pub(crate) fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, PROGRAM, (0, 0), content);
    }

    /// A symbolic link to `to`.
    pub(crate) fn link(&mut self, path: &str, to: &str) {
        self.entry(path, LINK, (0, 0), to.as_bytes());
    }

    /// A character device with its major and minor number.
    pub(crate) fn char_device(&mut self, path: &str, numbers: (u32, u32)) {
        self.entry(path, CHAR_DEVICE, numbers, &[]);
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a file of the guest is smaller than 4 GiB");
        let name = u32::try_from(path.len() + 1).expect("a path is short");
        // ino, mode, uid, gid, nlink, mtime, size, device major and minor, rdev major and minor, name length, checksum. The
        // time is always 0: the same parts make the same archive.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn it_is_laid_out_as_the_kernel_reads_it() {
        let mut archive = Archive::default();
        archive.folder("bin");
        archive.program("bin/x", b"hello");
        archive.link("bin/y", "x");
        archive.char_device("console", (5, 1));
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("07070100000001000041ed"), "a folder comes first");
        let file = text.find("bin/x\0").unwrap();
        let content = (file + "bin/x\0".len()).next_multiple_of(4);
        assert_eq!(&bytes[content..content + 8], b"hello\0\0\0");
        assert_eq!(&bytes[file - 110 + 54..file - 110 + 62], b"00000005", "the size stands in the seventh field");
        assert!(bytes.len().is_multiple_of(4) && text.contains("TRAILER!!!\0"));
    }
}
