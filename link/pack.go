package link

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// packMin is the size below which compression is not tried: it costs more time than it saves on the wire.
const packMin = 1 << 10

// packer compresses messages, each by itself. Not for concurrent use.
type packer struct{ enc *zstd.Encoder }

func newPacker() (*packer, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithWindowSize(chunkBytes), zstd.WithLowerEncoderMem(true), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
	if err != nil {
		return nil, fmt.Errorf("prepare compression: %w", err)
	}
	return &packer{enc}, nil
}

// pack returns b compressed, in new memory, or b itself when that is not clearly smaller.
func (p *packer) pack(b []byte) (out []byte, packed bool) {
	if len(b) < packMin {
		return b, false
	}
	out = p.enc.EncodeAll(b, make([]byte, 0, len(b)/2))
	if len(out) > len(b)*7/8 {
		return b, false
	}
	return out, true
}

// unpacker is the other end. Not for concurrent use.
type unpacker struct {
	dec     *zstd.Decoder
	scratch []byte
}

func newUnpacker() (*unpacker, error) {
	// A message never holds more than a chunk, whatever it claims: the limit bounds what a faulty peer can cost.
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(chunkBytes), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, fmt.Errorf("prepare decompression: %w", err)
	}
	return &unpacker{dec: dec}, nil
}

// unpack appends the contents of a message to dst.
func (u *unpacker) unpack(dst, b []byte, packed bool) ([]byte, error) {
	if !packed {
		return append(dst, b...), nil
	}
	// Not into dst directly: the decoder counts what is there already against its limit.
	var err error
	if u.scratch, err = u.dec.DecodeAll(b, u.scratch[:0]); err != nil {
		return dst, fmt.Errorf("decompress a message of %d bytes: %w", len(b), err)
	}
	return append(dst, u.scratch...), nil
}

// close ends what the decoder holds.
func (u *unpacker) close() { u.dec.Close() }
