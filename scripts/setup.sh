# Installs what is missing, for `run` and `test` to source. Debian packages need root or sudo; where
# there is neither, one line says what to install.

apt_updated=

install_packages() {
    local as=
    if ! command -v apt-get >/dev/null; then
        echo "missing: $*; please install them (there is no apt here to do it)" >&2
        return 1
    fi
    if [ "$(id -u)" != 0 ]; then
        as=sudo
        if ! command -v sudo >/dev/null; then
            echo "missing: $*; please run as root: apt-get install $*" >&2
            return 1
        fi
    fi
    echo "installing $*" >&2
    if [ -z "$apt_updated" ]; then
        $as apt-get update -qq
        apt_updated=1
    fi
    $as env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

# need PROGRAM PACKAGE: the program, from the package where it is missing.
need() {
    command -v "$1" >/dev/null || install_packages "$2"
    [ "$1" != cc ] || [ -e /usr/include/stdio.h ] || install_packages libc6-dev
}

# need_static PROGRAM PACKAGE: the same for a program that has to be linked statically.
need_static() {
    if ! command -v "$1" >/dev/null || ldd "$(command -v "$1")" >/dev/null 2>&1; then
        install_packages "$2"
    fi
}

# need_rust [COMPONENT...]: cargo of the version that the workspace asks for, with these components.
need_rust() {
    [ ! -d "$HOME/.cargo/bin" ] || PATH=$HOME/.cargo/bin:$PATH
    local want have
    want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    if ! command -v cargo >/dev/null; then
        command -v rustup >/dev/null || install_packages rustup || true
        if ! command -v rustup >/dev/null; then
            echo "Rust $want or later is missing: install it as https://www.rust-lang.org/tools/install says" >&2
            return 1
        fi
        rustup toolchain install stable --profile minimal --component rustfmt,clippy
        PATH=$HOME/.cargo/bin:$PATH
    fi
    have=$(rustc --version | cut -d' ' -f2)
    if [ "$(printf '%s\n%s\n' "$want" "$have" | sort -V | head -n 1)" != "$want" ]; then
        echo "Ruse needs Rust $want or later, this is $have; run: rustup update stable" >&2
        return 1
    fi
    local component
    for component in "$@"; do
        cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1 || rustup component add "$component"
    done
}

need_nextest() {
    cargo nextest --version >/dev/null 2>&1 || cargo install cargo-nextest --locked --quiet
}
