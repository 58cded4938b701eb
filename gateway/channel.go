package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// channel is the conversation of two processes, one of which takes the gateway over: messages of a kind, a body and descriptors,
// over a Unix-domain socket. send may be called at any time, receive by one goroutine.
type channel struct {
	c  *net.UnixConn
	mu sync.Mutex // held while something is sent
}

// Kinds of messages.
const (
	msgWelcome  = 'L' // old to new: a welcome, as JSON; descriptors: listeners, and the pipe that ends with the old process
	msgReady    = 'R' // new to old: it could accept
	msgGo       = 'G' // old to new: it accepts no more
	msgClient   = 'C' // old to new: a passed; descriptor: the client's connection
	msgAdopted  = 'A' // new to old: the number of a passed; it has it, and does nothing with it yet
	msgRefused  = 'N' // new to old: the number, and why it has not
	msgYours    = 'T' // old to new: the number; from now on it is the new one's alone
	msgCancel   = 'X' // new to old: pid and secret of a request to cancel a session that is not here
	msgPaused   = 'S' // new to old: the databases that are paused now, as JSON; its sessions that wait are not to wait there for ever
	msgProgress = 'P' // old to new: progress, as JSON
	msgDone     = 'D' // old to new: nothing more will come; the rest ends with the old process
	msgMayEnd   = 'E' // new to old, which has stayed after msgDone: it may end
	msgEnds     = 'Z' // old to new: it ends now, and takes nothing back
)

const (
	// frameMax bounds a message's body.
	frameMax = passedMax + 16
	// frameHead is the length of the body and the kind.
	frameHead = 5
	// descriptorsMax is how many descriptors come with a message at the most.
	descriptorsMax = 8
	// sendMax bounds how long the other process may take to take a message.
	sendMax = 10 * time.Second
)

// send sends a message. After an error nothing more may be sent, and the other side has not got all of this message.
func (ch *channel) send(kind byte, body []byte, fds ...int) error {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if err := ch.c.SetWriteDeadline(time.Now().Add(sendMax)); err != nil {
		return err
	}
	head := append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), kind)
	var oob []byte
	if len(fds) > 0 {
		oob = syscall.UnixRights(fds...)
	}
	n, m, err := ch.c.WriteMsgUnix(head, oob, nil)
	if err == nil && (n != len(head) || m != len(oob)) {
		err = io.ErrShortWrite
	}
	if err == nil && len(body) > 0 {
		_, err = ch.c.Write(body)
	}
	if err != nil {
		_ = ch.c.Close() // Half a message must not be taken for the beginning of the next.
	}
	return err
}

// sendNumber sends a message with the number of a session.
func (ch *channel) sendNumber(kind byte, id uint64, more ...byte) error {
	return ch.send(kind, append(binary.BigEndian.AppendUint64(nil, id), more...))
}

// number reads it.
func number(body []byte) (id uint64, more []byte, err error) {
	if len(body) < 8 {
		return 0, nil, errors.New("a message without a number")
	}
	return binary.BigEndian.Uint64(body), body[8:], nil
}

// receive waits for a message. The descriptors are the caller's, who must close them.
func (ch *channel) receive() (kind byte, body []byte, fds []int, err error) {
	var head [frameHead]byte
	oob := make([]byte, syscall.CmsgSpace(4*descriptorsMax))
	for got := 0; got < len(head); {
		n, m, flags, _, err := ch.c.ReadMsgUnix(head[got:], oob)
		more, perr := descriptors(oob[:m])
		fds = append(fds, more...)
		switch {
		case err != nil:
		case perr != nil:
			err = perr
		case flags&syscall.MSG_CTRUNC != 0:
			err = errors.New("more descriptors came than may")
		case n == 0:
			if err = io.EOF; got > 0 {
				err = io.ErrUnexpectedEOF
			}
		}
		if err != nil {
			closeAll(fds)
			return 0, nil, nil, err
		}
		got += n
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > frameMax {
		closeAll(fds)
		return 0, nil, nil, fmt.Errorf("a message of %d bytes came, where up to %d are possible", size, frameMax)
	}
	body = make([]byte, size)
	if _, err := io.ReadFull(ch.c, body); err != nil {
		closeAll(fds)
		return 0, nil, nil, noEOF(err)
	}
	return head[4], body, fds, nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// descriptors takes them out of control messages.
func descriptors(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		more, err := syscall.ParseUnixRights(&messages[i])
		if err != nil {
			closeAll(fds)
			return nil, err
		}
		fds = append(fds, more...)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = syscall.Close(fd)
	}
}
