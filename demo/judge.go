package demo

import (
	"cmp"
	"fmt"
	"slices"
)

// payment is a row of finance.payment that one of the demo's clients wrote.
type payment struct {
	id     string
	client int
	seq    int64
	amount int64 // KRW
}

// facts are what one site holds.
type facts struct {
	payments []payment
	audit    map[string]int // payment id -> number of entries in the audit log
}

// verdict compares the clients' records with both sites. Counts are of payments; a payment that is wrong at both sites
// counts once.
type verdict struct {
	acknowledged int
	lost         int   // acknowledged, and its row or its audit entry is absent at a site
	doubled      int   // there more than once, as a row or as an audit entry
	unexpected   int   // there although no client sent its COMMIT, or with another amount
	inDoubt      int   // COMMIT was sent, no answer came
	inDoubtThere int   // of those: committed, as it turned out
	inDoubtSplit int   // of those: committed at one site and absent at the other
	rolledBack   int   // certainly not committed
	sumClient    int64 // of what the clients know to be committed, and of the in-doubt ones that are there
	sum          [2]int64
	payments     [2]int
	examples     []string // the first few that are wrong, in words
}

// ok reports that nothing is wrong.
func (v verdict) ok() bool {
	return v.lost == 0 && v.doubled == 0 && v.unexpected == 0 && v.inDoubtSplit == 0 &&
		v.sum[0] == v.sumClient && v.sum[1] == v.sumClient
}

// exampleMax bounds the examples in a verdict.
const exampleMax = 5

// key names a payment as its client does.
type key struct {
	client int
	seq    int64
}

// seen is what a site holds of one payment.
type seen struct {
	rows, audit int
	amount      int64
}

// judge makes the verdict. It is pure.
func judge(records []entry, names [2]string, sites [2]facts) verdict {
	var v verdict
	var index [2]map[key]seen
	for i, s := range sites {
		index[i] = indexOf(s)
		for _, p := range s.payments {
			v.sum[i] += p.amount
		}
		v.payments[i] = len(s.payments)
	}
	known := map[key]bool{}
	for _, e := range records {
		k := key{e.client, e.seq}
		known[k] = true
		v.judgeOne(e, names, [2]seen{index[0][k], index[1][k]})
	}
	v.strangers(known, names, index)
	v.strayAudit(names, sites)
	return v
}

// strayAudit counts audit entries of payments that a site does not hold.
func (v *verdict) strayAudit(names [2]string, sites [2]facts) {
	var ids []string
	at := map[string]string{}
	for i, s := range sites {
		rows := map[string]bool{}
		for _, p := range s.payments {
			rows[p.id] = true
		}
		for id := range s.audit {
			if _, dup := at[id]; !rows[id] && !dup {
				at[id] = names[i]
				ids = append(ids, id)
			}
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		v.unexpected++
		v.example("the audit log at %s has payment %s, which is not in the payments there", at[id], id)
	}
}

func indexOf(s facts) map[key]seen {
	index := map[key]seen{}
	for _, p := range s.payments {
		k := key{p.client, p.seq}
		was := index[k]
		index[k] = seen{rows: was.rows + 1, audit: max(was.audit, s.audit[p.id]), amount: p.amount}
	}
	return index
}

// judgeOne adds one recorded payment to the verdict.
func (v *verdict) judgeOne(e entry, names [2]string, at [2]seen) {
	there := at[0].rows > 0 || at[1].rows > 0
	switch e.outcome {
	case committed:
		v.acknowledged++
		v.sumClient += e.amount
		v.absent(e, names, at)
	case unknown:
		v.inDoubt++
		if there {
			v.inDoubtThere++
			v.sumClient += e.amount
		}
		if (at[0].rows > 0) != (at[1].rows > 0) {
			v.inDoubtSplit++
			v.example("in doubt and not the same at both sites: %s", e)
		}
		v.half(e, names, at)
	case rolledBack:
		v.rolledBack++
		if there {
			v.unexpected++
			v.example("rolled back and yet there: %s", e)
		}
	}
	for i, s := range at {
		if s.rows > 1 || s.audit > 1 {
			v.doubled++
			v.example("there %d times, with %d audit entries, at %s: %s", s.rows, s.audit, names[i], e)
			break
		}
	}
	for i, s := range at {
		if e.outcome != rolledBack && s.rows == 1 && s.amount != e.amount {
			v.unexpected++
			v.example("amount %d instead of %d at %s: %s", s.amount, e.amount, names[i], e)
			break
		}
	}
}

// absent looks whether an acknowledged payment is missing at a site. One whose audit entry alone is missing is lost too:
// both were one transaction.
func (v *verdict) absent(e entry, names [2]string, at [2]seen) {
	for i, s := range at {
		if s.rows == 0 || s.audit == 0 {
			v.lost++
			v.example("acknowledged by %s and absent at %s (rows %d, audit entries %d): %s", e.site, names[i], s.rows, s.audit, e)
			return
		}
	}
}

// half looks whether a site holds a payment without its audit entry: both were one transaction.
func (v *verdict) half(e entry, names [2]string, at [2]seen) {
	for i, s := range at {
		if s.rows > 0 && s.audit == 0 {
			v.unexpected++
			v.example("there without its audit entry at %s: %s", names[i], e)
			return
		}
	}
}

// strangers counts payments that no record knows.
func (v *verdict) strangers(known map[key]bool, names [2]string, index [2]map[key]seen) {
	for i := range index {
		var strange []key
		for k := range index[i] {
			if !known[k] {
				known[k] = true // once, if it is at both sites
				strange = append(strange, k)
			}
		}
		slices.SortFunc(strange, func(a, b key) int {
			return cmp.Or(cmp.Compare(a.client, b.client), cmp.Compare(a.seq, b.seq))
		})
		for _, k := range strange {
			v.unexpected++
			v.example("at %s, and no client sent its COMMIT: client %d, payment %d", names[i], k.client, k.seq)
		}
	}
}

func (v *verdict) example(format string, args ...any) {
	if len(v.examples) < exampleMax {
		v.examples = append(v.examples, fmt.Sprintf(format, args...))
	}
}

// String names a payment for a person.
func (e entry) String() string {
	return fmt.Sprintf("client %d, payment %d (%s)", e.client, e.seq, e.id)
}
